/* Loads and clocks for the benchmarks that a script is too slow for.
 *
 *   load flood DEVICE MAC|- SOURCE TARGET PORT SIZE SECS
 *       UDP datagrams of SIZE bytes into an interface, as many as the processor makes: a packet
 *       socket, past the queueing discipline, 64 per call. MAC is the next hop's on a link that
 *       has such addresses. Prints how many it made; the interface drops those that it has no room for.
 *   load burn PERIOD_US WORK_US STAGES SECS
 *       Every period, so many threads work one after the other, each woken by the one before.
 *   load hops COUNT TIMES EVERY_US
 *       A token goes round COUNT sleeping threads; prints the microseconds of each round.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define HEADERS 28
#define MAX_STAGES 32

static void die(const char *what) {
	perror(what);
	exit(1);
}

static uint64_t now_ns(void) {
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

static void sleep_until(uint64_t at) {
	struct timespec until = { .tv_sec = (time_t)(at / 1000000000u), .tv_nsec = (long)(at % 1000000000u) };
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
		;
}

/* RFC 1071, over an even number of bytes in network order. */
static uint32_t sum_of(const uint8_t *bytes, size_t len, uint32_t sum) {
	for (size_t at = 0; at < len; at += 2)
		sum += (uint32_t)(bytes[at] << 8 | bytes[at + 1]);
	return sum;
}

static void put16(uint8_t *at, uint32_t value) {
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static uint16_t checksum(uint32_t sum) {
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

/* An IPv4 header and a UDP header, both checksums right, in front of zeros. */
static void write_datagram(uint8_t *packet, const char *source, const char *target, int port, int size) {
	memset(packet, 0, (size_t)(HEADERS + size + 1));
	packet[0] = 0x45;
	put16(packet + 2, (uint32_t)(HEADERS + size));
	packet[6] = 0x40;
	packet[8] = 64;
	packet[9] = IPPROTO_UDP;
	if (inet_pton(AF_INET, source, packet + 12) != 1 || inet_pton(AF_INET, target, packet + 16) != 1) {
		fprintf(stderr, "not an IPv4 address: %s or %s\n", source, target);
		exit(2);
	}
	put16(packet + 20, 40000);
	put16(packet + 22, (uint32_t)port);
	put16(packet + 24, (uint32_t)(8 + size));
	uint32_t pseudo = sum_of(packet + 12, 8, IPPROTO_UDP + (uint32_t)(8 + size));
	uint16_t udp = checksum(sum_of(packet + 20, 8, pseudo));
	put16(packet + 26, udp ? udp : 0xffff);
}

/* Identifiers count up, as those of a connected socket of the kernel do. */
static void number(uint8_t *packet, uint32_t id) {
	put16(packet + 4, id);
	put16(packet + 10, 0);
	put16(packet + 10, checksum(sum_of(packet, 20, 0)));
}

static void flood(char **args) {
	const char *device = args[0];
	int size = atoi(args[5]);
	double secs = atof(args[6]);
	struct sockaddr_ll to = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP) };
	to.sll_ifindex = (int)if_nametoindex(device);
	if (!to.sll_ifindex)
		die(device);
	if (strcmp(args[1], "-") != 0) {
		to.sll_halen = 6;
		unsigned char *mac = to.sll_addr;
		if (sscanf(args[1], "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5) != 6) {
			fprintf(stderr, "not an address of a link: %s\n", args[1]);
			exit(2);
		}
	}
	int out = socket(AF_PACKET, SOCK_DGRAM, 0);
	if (out < 0)
		die("packet socket");
	int on = 1;
	if (setsockopt(out, SOL_PACKET, PACKET_QDISC_BYPASS, &on, sizeof on))
		die("PACKET_QDISC_BYPASS");
	uint8_t *packets[BATCH];
	struct iovec pieces[BATCH];
	struct mmsghdr batch[BATCH];
	memset(batch, 0, sizeof batch);
	for (int i = 0; i < BATCH; i++) {
		packets[i] = malloc((size_t)(HEADERS + size + 1));
		if (!packets[i])
			die("memory");
		write_datagram(packets[i], args[2], args[3], atoi(args[4]), size);
		pieces[i] = (struct iovec){ packets[i], (size_t)(HEADERS + size) };
		batch[i].msg_hdr = (struct msghdr){ .msg_name = &to, .msg_namelen = sizeof to, .msg_iov = &pieces[i], .msg_iovlen = 1 };
	}
	uint64_t made = 0, end = now_ns() + (uint64_t)(secs * 1e9);
	for (uint32_t id = 0; now_ns() < end; id += BATCH) {
		for (uint32_t i = 0; i < BATCH; i++)
			number(packets[i], id + i);
		/* One that the interface has no room for ends the call, and is not tried again. */
		for (int at = 0; at < BATCH;) {
			int sent = sendmmsg(out, batch + at, (unsigned)(BATCH - at), 0);
			if (sent < 0 && errno != ENOBUFS && errno != EAGAIN)
				die("sendmmsg");
			at += (sent < 0 ? 0 : sent) + (at + sent < BATCH);
		}
		made += BATCH;
	}
	printf("%llu\n", (unsigned long long)made);
}

struct stage {
	int in, out;
	uint64_t work_ns;
};

static void work(uint64_t ns) {
	for (uint64_t end = now_ns() + ns; now_ns() < end;)
		;
}

/* Works for each token and hands it on; the last stage of a burner has nobody to hand it to. */
static void *serve(void *argument) {
	struct stage *stage = argument;
	uint64_t token;
	while (read(stage->in, &token, sizeof token) == sizeof token) {
		work(stage->work_ns);
		token = 1;
		if (stage->out >= 0 && write(stage->out, &token, sizeof token) != sizeof token)
			die("write");
	}
	return NULL;
}

/* A chain of sleeping threads; returns where it begins. `last` is where it ends, or -1. */
static int chain(int count, uint64_t work_ns, int last) {
	static struct stage stages[MAX_STAGES];
	if (count < 1 || count > MAX_STAGES) {
		fprintf(stderr, "1 to %d threads\n", MAX_STAGES);
		exit(2);
	}
	for (int i = count - 1; i >= 0; i--) {
		int in = eventfd(0, 0);
		pthread_t thread;
		if (in < 0)
			die("eventfd");
		stages[i] = (struct stage){ in, i == count - 1 ? last : stages[i + 1].in, work_ns };
		if (pthread_create(&thread, NULL, serve, &stages[i]))
			die("thread");
	}
	return stages[0].in;
}

static void burn(char **args) {
	uint64_t period = strtoull(args[0], NULL, 10) * 1000, work_ns = strtoull(args[1], NULL, 10) * 1000;
	int first = chain(atoi(args[2]), work_ns, -1);
	uint64_t next = now_ns(), end = next + (uint64_t)(atof(args[3]) * 1e9), token = 1;
	for (; next < end; next += period) {
		sleep_until(next);
		if (write(first, &token, sizeof token) != sizeof token)
			die("write");
	}
}

static void hops(char **args) {
	int back = eventfd(0, 0), times = atoi(args[1]);
	if (back < 0)
		die("eventfd");
	int first = chain(atoi(args[0]), 0, back);
	uint64_t every = strtoull(args[2], NULL, 10) * 1000, next = now_ns();
	for (int i = 0; i < times; i++, next += every) {
		sleep_until(next);
		uint64_t start = now_ns(), token = 1;
		if (write(first, &token, sizeof token) != sizeof token || read(back, &token, sizeof token) != sizeof token)
			die("token");
		printf("%.1f\n", (double)(now_ns() - start) / 1e3);
	}
}

int main(int count, char **args) {
	if (count == 9 && !strcmp(args[1], "flood"))
		flood(args + 2);
	else if (count == 6 && !strcmp(args[1], "burn"))
		burn(args + 2);
	else if (count == 5 && !strcmp(args[1], "hops"))
		hops(args + 2);
	else {
		fprintf(stderr, "usage: see the head of load.c\n");
		return 2;
	}
	return 0;
}
