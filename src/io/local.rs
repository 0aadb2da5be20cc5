//! The local socket of a daemon: JSON, one value a line, over a Unix stream.
//!
//! Whoever can open the socket may read: it belongs to the daemon's user and group, mode 0660.
//! Changes are for root and the daemon's own user; the kernel says who asks. There is no TCP and no
//! HTTP, so no web page and no other machine can reach it. The types of the questions and answers
//! are the daemons' own.

mod bind;
mod places;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use places::{Place, Places};

/// A question is never longer: a file of access rules, every byte of it escaped.
const MAX_QUESTION_BYTES: usize = 256 * 1024;
/// An answer is never longer: the nodes of a large network.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// How long a client may take to ask, or to take an answer.
const IO_LIMIT: Duration = Duration::from_secs(10);

/// What can go wrong on a local socket.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// Nobody listens there.
    #[error("no daemon listens on {}", path.display())]
    NotRunning {
        /// The socket.
        path: PathBuf,
    },
    /// This user may not open it.
    #[error("no permission to use {}", path.display())]
    Permission {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A daemon listens there already.
    #[error("a daemon already listens on {}", path.display())]
    AlreadyRunning {
        /// The socket.
        path: PathBuf,
    },
    /// The place of the socket is taken by something else.
    #[error("{} exists and is no socket", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The file system or the socket failed.
    #[error("local socket {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A line that is too long, or not what was expected.
    #[error("the other side of the local socket is not understood: {reason}")]
    NotUnderstood {
        /// What is wrong.
        reason: String,
    },
    /// The other side was silent for too long.
    #[error("the other side of the local socket does not answer")]
    TimedOut,
}

impl LocalError {
    fn at(path: &Path) -> impl Fn(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| match source.kind() {
            io::ErrorKind::PermissionDenied => Self::Permission { path: path.clone(), source },
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                Self::NotRunning { path: path.clone() }
            }
            _ => Self::Io { path: path.clone(), source },
        }
    }
}

/// An answer, or why there is none: the shape that every daemon's answers have on the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply<T> {
    /// It worked.
    Ok(T),
    /// It did not.
    Error(Refusal),
}

/// Why a daemon does not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The exit code of the command.
    pub code: u8,
    /// What happened.
    pub error: String,
    /// Why.
    pub cause: String,
    /// What to type next.
    pub help: String,
}

/// Who is at the other end of a connection, as the kernel says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Whether this user may change things: root, or the daemon's own user.
    pub may_write: bool,
}

/// A daemon's local socket; its file is removed when this is dropped.
#[derive(Debug)]
pub struct LocalListener {
    listener: UnixListener,
    path: PathBuf,
    places: Places,
}

impl LocalListener {
    /// Makes the socket. What a killed daemon left is removed; a living one is not disturbed.
    ///
    /// # Errors
    /// [`LocalError::AlreadyRunning`] when a daemon listens there, and what the kernel says.
    pub async fn bind(path: &Path) -> Result<Self, LocalError> {
        let listener = bind::socket(path).await?;
        Ok(Self { listener, path: path.to_path_buf(), places: Places::default() })
    }

    /// The next connection. Cancel-safe. One for which there is no place is closed at once.
    ///
    /// # Errors
    /// What the kernel says; the listener stays usable.
    pub async fn accept(&self) -> io::Result<LocalConnection> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            let credentials = stream.peer_cred()?;
            let (uid, gid) = (credentials.uid(), credentials.gid());
            let may_write = uid == 0 || uid == nix::unistd::geteuid().as_raw();
            let Some(place) = self.places.take(uid, may_write) else { continue };
            let peer = Peer { uid, gid, may_write };
            let lines = Lines::new(stream, self.path.clone());
            return Ok(LocalConnection { peer, lines, _place: place });
        }
    }
}

impl Drop for LocalListener {
    fn drop(&mut self) {
        // When it is gone already, all is as it should be.
        let _ = fs::remove_file(&self.path);
    }
}

/// One command being served.
#[derive(Debug)]
pub struct LocalConnection {
    /// Who asks.
    pub peer: Peer,
    lines: Lines,
    _place: Place,
}

impl LocalConnection {
    /// The next question; `None` when the client has hung up.
    ///
    /// # Errors
    /// When none comes in ten seconds, or one that is not understood.
    pub async fn question<Q: DeserializeOwned>(&mut self) -> Result<Option<Q>, LocalError> {
        timeout(IO_LIMIT, self.lines.next(MAX_QUESTION_BYTES))
            .await
            .map_err(|_| LocalError::TimedOut)?
    }

    /// Waits until the client has hung up; what it says on the way is not listened to.
    pub async fn hung_up(&mut self) {
        while let Ok(1..) = self.lines.stream.read_buf(&mut self.lines.buffer).await {
            self.lines.buffer.clear();
        }
    }

    /// Sends one answer; a question may have any number of them.
    ///
    /// # Errors
    /// When the client does not take it.
    pub async fn answer<A: Serialize>(&mut self, answer: &A) -> Result<(), LocalError> {
        self.lines.write(answer).await
    }
}

/// The asking side.
#[derive(Debug)]
pub struct LocalClient {
    lines: Lines,
}

impl LocalClient {
    /// Connects to the daemon behind `path`.
    ///
    /// # Errors
    /// [`LocalError::NotRunning`] or [`LocalError::Permission`], mostly.
    pub async fn connect(path: &Path) -> Result<Self, LocalError> {
        let stream = UnixStream::connect(path).await.map_err(LocalError::at(path))?;
        Ok(Self { lines: Lines::new(stream, path.to_path_buf()) })
    }

    /// Asks.
    ///
    /// # Errors
    /// When the daemon does not take the question.
    pub async fn ask<Q: Serialize>(&mut self, question: &Q) -> Result<(), LocalError> {
        self.lines.write(question).await
    }

    /// The next answer; `None` when there are no more. Waits as long as it takes.
    ///
    /// # Errors
    /// When the connection fails or the answer is not understood.
    pub async fn next<A: DeserializeOwned>(&mut self) -> Result<Option<A>, LocalError> {
        self.lines.next(MAX_ANSWER_BYTES).await
    }
}

#[derive(Debug)]
struct Lines {
    stream: UnixStream,
    path: PathBuf,
    buffer: Vec<u8>,
    /// How much of `buffer` is known to hold no line end.
    searched: usize,
}

impl Lines {
    fn new(stream: UnixStream, path: PathBuf) -> Self {
        Self { stream, path, buffer: Vec::new(), searched: 0 }
    }

    /// Cancel-safe: what was read so far stays in the buffer.
    async fn next<T: DeserializeOwned>(&mut self, limit: usize) -> Result<Option<T>, LocalError> {
        let not_understood = |reason: String| LocalError::NotUnderstood { reason };
        loop {
            let unsearched = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(at) = unsearched.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(self.searched + at + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                self.searched = 0;
                let value = serde_json::from_slice(&line);
                return value.map(Some).map_err(|error| not_understood(error.to_string()));
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > limit {
                return Err(not_understood(format!("a line of more than {limit} bytes")));
            }
            self.buffer.reserve(4096);
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) if self.buffer.is_empty() => return Ok(None),
                Ok(0) => return Err(not_understood("it ends in the middle of a line".into())),
                Ok(_) => {}
                // A daemon that is killed while it answers resets the connection.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(LocalError::at(&self.path)(error)),
            }
        }
    }

    async fn write<T: Serialize>(&mut self, value: &T) -> Result<(), LocalError> {
        let mut line = serde_json::to_vec(value)
            .map_err(|error| LocalError::NotUnderstood { reason: error.to_string() })?;
        line.push(b'\n');
        timeout(IO_LIMIT, self.stream.write_all(&line))
            .await
            .map_err(|_| LocalError::TimedOut)?
            .map_err(LocalError::at(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    async fn pair(path: &Path) -> (LocalListener, LocalConnection, LocalClient) {
        let listener = LocalListener::bind(path).await.unwrap();
        let client = LocalClient::connect(path).await.unwrap();
        let connection = listener.accept().await.unwrap();
        (listener, connection, client)
    }

    #[tokio::test]
    async fn one_question_may_have_many_answers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/server.sock");
        let (listener, mut connection, mut client) = pair(&path).await;
        assert!(connection.peer.may_write, "we are the daemon's own user");
        client.ask(&"how many?").await.unwrap();
        assert_eq!(connection.question::<String>().await.unwrap().unwrap(), "how many?");
        for number in 0..3 {
            connection.answer(&Reply::Ok(number)).await.unwrap();
        }
        drop(connection);
        for number in 0..3 {
            assert_eq!(client.next::<Reply<u32>>().await.unwrap(), Some(Reply::Ok(number)));
        }
        assert_eq!(client.next::<Reply<u32>>().await.unwrap(), None);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        drop(listener);
        assert!(!path.exists(), "the file goes with the listener");
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(matches!(LocalClient::connect(&path).await, Err(LocalError::NotRunning { .. })));
        let _listener = LocalListener::bind(&path).await.unwrap();
        assert!(matches!(LocalListener::bind(&path).await, Err(LocalError::AlreadyRunning { .. })));
        let file = dir.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(matches!(LocalListener::bind(&file).await, Err(LocalError::NotASocket { .. })));
    }

    #[tokio::test]
    async fn endless_lines_and_other_words_are_not_understood() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.sock");
        let (_listener, mut connection, mut client) = pair(&path).await;
        client.ask(&"text").await.unwrap();
        let error = connection.question::<u32>().await.unwrap_err();
        assert!(matches!(error, LocalError::NotUnderstood { .. }));
        let long = "x".repeat(2 * MAX_QUESTION_BYTES);
        let (asked, heard) = tokio::join!(client.ask(&long), async {
            let heard = connection.question::<String>().await;
            drop(connection);
            heard
        });
        assert!(matches!(heard, Err(LocalError::NotUnderstood { .. })));
        drop(asked);
    }

    #[tokio::test]
    async fn there_are_only_so_many_places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.sock");
        let listener = LocalListener::bind(&path).await.unwrap();
        let mut inside = Vec::new();
        for _ in 0..places::ALL {
            let client = LocalClient::connect(&path).await.unwrap();
            inside.push((client, listener.accept().await.unwrap()));
        }
        let mut late = LocalClient::connect(&path).await.unwrap();
        tokio::select! {
            _ = listener.accept() => panic!("there is no place"),
            answer = late.next::<u32>() => assert_eq!(answer.unwrap(), None),
        }
        inside.pop();
        let _client = LocalClient::connect(&path).await.unwrap();
        listener.accept().await.unwrap();
    }
}
