//! Where a running lab is written down, so that `overlay lab exec` finds it.
//!
//! One directory per user, closed to others; in it one file per lab, and one directory per lab that
//! serves as the mount point of the lab's own files.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write};
use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// What another process has to know to join a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LabState {
    pub(crate) schema: u32,
    /// The first process of the lab, as its starter's PID namespace numbers it.
    pub(crate) pid: i32,
    /// The inode of the lab's PID namespace: the PID may belong to somebody else by now.
    pub(crate) pid_namespace: u64,
    pub(crate) started_unix: u64,
    pub(crate) machines: Vec<MachineState>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachineState {
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    /// The network namespace, as a descriptor of the lab's first process.
    pub(crate) namespace_fd: RawFd,
    /// The local socket of what runs on the machine.
    pub(crate) socket: Option<PathBuf>,
    /// Where it keeps its state: what is started there by hand goes on with it.
    pub(crate) state_dir: Option<PathBuf>,
}

impl LabState {
    /// Whether the lab is still there.
    pub(crate) fn is_alive(&self) -> bool {
        let namespace = |kind| fs::metadata(format!("/proc/{}/ns/{kind}", self.pid));
        // A dead process that nobody has waited for has a PID namespace, and no mount namespace.
        namespace("pid").is_ok_and(|pid| pid.ino() == self.pid_namespace)
            && namespace("mnt").is_ok()
    }

    /// Writes the file so that nobody ever reads a half of it.
    pub(crate) fn write(&self, lab_directory: &Path) -> Result<()> {
        let path = state_file(lab_directory);
        let part = path.with_extension("part");
        let write = || -> Result<()> {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&part)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            fs::rename(&part, &path)?;
            Ok(())
        };
        write().with_context(|| format!("writing {}", path.display()))
    }
}

/// The file beside a lab's directory.
pub(crate) fn state_file(lab_directory: &Path) -> PathBuf {
    lab_directory.with_extension("json")
}

/// The directory of this user's labs, made if need be.
pub(crate) fn labs_directory() -> Result<PathBuf> {
    let user = nix::unistd::geteuid();
    // Under sudo the variable may still name the directory of somebody else.
    let ours = |runtime: &PathBuf| {
        fs::metadata(runtime).is_ok_and(|facts| facts.is_dir() && facts.uid() == user.as_raw())
    };
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(ours);
    let candidates = match runtime {
        Some(runtime) => vec![runtime.join("overlay-lab")],
        // One that another user namespace made under our number is not ours; then the next one is.
        None => std::iter::once(format!("/tmp/overlay-lab-{user}"))
            .chain((2..10).map(|number| format!("/tmp/overlay-lab-{user}-{number}")))
            .map(PathBuf::from)
            .collect(),
    };
    for directory in &candidates {
        let shown = directory.display();
        match DirBuilder::new().mode(0o700).create(directory) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("creating {shown}")),
        }
        let facts =
            fs::symlink_metadata(directory).with_context(|| format!("looking at {shown}"))?;
        if facts.is_dir() && facts.uid() == user.as_raw() && facts.mode() & 0o077 == 0 {
            return Ok(directory.clone());
        }
    }
    let first = candidates.first().map(|directory| directory.display().to_string());
    bail!("{} is not a directory that only you can enter; remove it", first.unwrap_or_default());
}

/// Makes the directory of a new lab.
pub(crate) fn create_lab_directory(labs: &Path) -> Result<PathBuf> {
    let directory = labs.join(std::process::id().to_string());
    remove_lab_files(&directory);
    let made = DirBuilder::new().mode(0o700).create(&directory);
    made.with_context(|| format!("creating {}", directory.display()))?;
    Ok(directory)
}

/// Removes what a lab leaves; what is not there is no error.
pub(crate) fn remove_lab_files(lab_directory: &Path) {
    let _ = fs::remove_file(state_file(lab_directory));
    let _ = fs::remove_file(lab_directory.with_extension("part"));
    let _ = fs::remove_dir_all(lab_directory);
}

/// The labs of this user that are running, the newest first.
pub(crate) fn running(labs: &Path) -> Result<Vec<LabState>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(labs).with_context(|| format!("reading {}", labs.display()))? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            remove_if_abandoned(&path);
            continue;
        }
        let state: Option<LabState> =
            fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        match state {
            Some(state) if state.is_alive() => found.push(state),
            // Its lab was killed; nobody else tidies up after it.
            Some(_) => remove_lab_files(&path.with_extension("")),
            None => {}
        }
    }
    found.sort_by_key(|state| std::cmp::Reverse(state.started_unix));
    Ok(found)
}

/// Removes the directory of a lab that was killed before it was ready.
fn remove_if_abandoned(path: &Path) {
    let starter = path.file_name().map(|pid| Path::new("/proc").join(pid));
    if starter.is_some_and(|starter| !starter.exists()) && !state_file(path).exists() {
        // Only an empty one: nothing of anybody else's is in danger.
        let _ = fs::remove_dir(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(pid: i32, pid_namespace: u64, started_unix: u64) -> LabState {
        LabState { schema: 1, pid, pid_namespace, started_unix, machines: Vec::new() }
    }

    #[test]
    fn the_newest_running_lab_comes_first_and_dead_ones_are_tidied_up() {
        let labs = tempfile::tempdir().unwrap();
        let us = i32::try_from(std::process::id()).unwrap();
        let namespace = fs::metadata("/proc/self/ns/pid").unwrap().ino();
        let written = [
            ("1", state(us, namespace, 100)),
            ("2", state(us, namespace, 200)),
            ("3", state(us, namespace + 1, 300)),
        ];
        for (name, state) in &written {
            state.write(&labs.path().join(name)).unwrap();
        }
        fs::write(labs.path().join("4.json"), "not JSON").unwrap();
        fs::create_dir(labs.path().join("99999999")).unwrap();
        fs::create_dir(labs.path().join(us.to_string())).unwrap();

        let found = running(labs.path()).unwrap();
        assert_eq!(found, [written[1].1.clone(), written[0].1.clone()], "newest first");
        assert!(!labs.path().join("3.json").exists(), "that PID is somebody else by now");
        assert!(!labs.path().join("99999999").exists(), "no such process: abandoned");
        assert!(labs.path().join(us.to_string()).exists(), "its process is still building it");
        let mode = fs::metadata(labs.path().join("1.json")).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600, "others must not read it");
    }
}
