/* How long a processor that sleeps takes to wake, by how long it has slept.
 *
 *   cc -O2 -pthread -o /tmp/wake tests/bench/wake.c && /tmp/wake
 *
 * One thread on processor 0 waits busily, then wakes one on processor 1 by an eventfd and looks how long
 * it takes until that runs. Prints medians and 90th percentiles; takes eight seconds at most. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 1000, LEAST = 150, BUDGET_US = 400000 };

static int event;
static _Atomic int woken;
static double called_at, waits[MOST];

static double now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void stay_on(int processor)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(processor, &set);
	if (sched_setaffinity(0, sizeof set, &set)) {
		perror("sched_setaffinity");
		exit(1);
	}
}

/* Ends with the program. */
static void *sleeper(void *unused)
{
	uint64_t count;
	stay_on(1);
	while (read(event, &count, sizeof count) == sizeof count) {
		int number = atomic_load(&woken);
		waits[number % MOST] = now_us() - called_at;
		atomic_store(&woken, number + 1);
	}
	return unused;
}

static int ascending(const void *a, const void *b)
{
	double less = *(const double *)a - *(const double *)b;
	return (less > 0) - (less < 0);
}

int main(void)
{
	static const int slept_us[] = { 20, 50, 100, 200, 500, 1000, 2000, 5000 };
	pthread_t thread;
	stay_on(0);
	event = eventfd(0, EFD_CLOEXEC);
	if (event < 0 || pthread_create(&thread, NULL, sleeper, NULL)) {
		perror("wake");
		return 1;
	}
	usleep(10000);
	for (size_t i = 0; i < sizeof slept_us / sizeof *slept_us; i++) {
		int times = BUDGET_US / slept_us[i];
		times = times > MOST ? MOST : times < LEAST ? LEAST : times;
		atomic_store(&woken, 0);
		for (int number = 0; number < times; number++) {
			uint64_t one = 1;
			double until = now_us() + slept_us[i];
			while (now_us() < until)
				;
			called_at = now_us();
			if (write(event, &one, sizeof one) != sizeof one)
				return 1;
			while (atomic_load(&woken) <= number)
				;
		}
		qsort(waits, times, sizeof *waits, ascending);
		printf("slept %4d us: wakes in %.0f us, 90th percentile %.0f\n", slept_us[i], waits[times / 2],
		       waits[times * 9 / 10]);
	}
	return 0;
}
