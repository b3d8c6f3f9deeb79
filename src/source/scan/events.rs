//! Keyspace notifications: which keys have changed, told by the server.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::ScanError;
use super::changed::Changed;
use crate::connection::{Address, Connection, Dialer};
use crate::resp::Reply;

const SETTING: &[u8] = b"notify-keyspace-events";
/// Classes of events that `A` stands for; a server that has all of them on says `A`.
const CLASSES: &str = "g$lshzxetd";
/// The subscription is asked for again this often, which is answered, and shows that the server is there.
const ALIVE: Duration = Duration::from_secs(15);
const SILENCE: Duration = Duration::from_secs(60);
const RESTORING: Duration = Duration::from_secs(3);

/// What was changed on servers, and has to be set back.
#[derive(Clone, Debug, Default)]
pub struct Undo {
    settings: Arc<Mutex<Vec<Former>>>,
}

#[derive(Clone, Debug)]
struct Former {
    address: Address,
    value: String,
    /// As the server tells it since.
    ours: String,
}

impl Undo {
    /// Sets back what nobody else has changed meanwhile.
    pub async fn restore(&self, dialer: &Dialer) {
        let settings = std::mem::take(&mut *self.settings.lock().unwrap_or_else(PoisonError::into_inner));
        let dialer = dialer.with_connect_timeout(RESTORING).with_response_timeout(RESTORING);
        for Former { address, value, ours } in settings {
            let restored = async {
                let mut connection = dialer.connect(&address).await?;
                if setting(&mut connection).await? == Some(ours) {
                    connection.query(&[b"CONFIG", b"SET", SETTING, value.as_bytes()]).await?;
                }
                Ok::<(), ScanError>(())
            };
            if let Err(error) = restored.await {
                tracing::warn!(%address, %error, "notify-keyspace-events stays as the scan had set it; it was {value:?}");
            }
        }
    }

    fn keep(&self, former: Former) {
        let mut settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        if settings.iter().all(|known| known.address != former.address) {
            settings.push(former);
        }
    }
}

/// How the server is set; `None`: it does not let us ask.
pub async fn setting(connection: &mut Connection) -> Result<Option<String>, ScanError> {
    match connection.call(&[b"CONFIG", b"GET", SETTING]).await? {
        Reply::Error(_) => Ok(None),
        reply => Ok(reply.items().get(1).and_then(Reply::text).map(str::to_owned)),
    }
}

/// True when these flags make the server tell of every change.
pub fn is_complete(flags: &str) -> bool {
    flags.contains('A') && flags.contains(['K', 'E'])
}

/// Has the server tell of every change. The flags then; `None`: it does not let us.
pub async fn set(
    connection: &mut Connection,
    former: &str,
    undo: &Undo,
) -> Result<Option<String>, ScanError> {
    let others = former.chars().filter(|flag| !"AE".contains(*flag) && !CLASSES.contains(*flag));
    let wanted: String = "AE".chars().chain(others).collect();
    if let Reply::Error(text) = connection.call(&[b"CONFIG", b"SET", SETTING, wanted.as_bytes()]).await? {
        tracing::info!(text = %String::from_utf8_lossy(&text), "notify-keyspace-events cannot be set");
        return Ok(None);
    }
    let now = setting(connection).await?.unwrap_or(wanted);
    let (address, value) = (connection.address().clone(), former.to_owned());
    undo.keep(Former { address, value, ours: now.clone() });
    Ok(Some(now))
}

/// A subscription, until it is dropped.
pub struct Events {
    address: Address,
    task: JoinHandle<()>,
    ask: mpsc::Sender<oneshot::Sender<u64>>,
    heard: watch::Receiver<Heard>,
}

#[derive(Clone, Debug, Default)]
struct Heard {
    /// Answers to the subscription.
    answers: u64,
    /// Why nothing is heard any more.
    lost: Option<String>,
}

impl Events {
    /// Returns when the server has confirmed: every change from here on is told.
    pub async fn subscribe(
        dialer: &Dialer,
        address: &Address,
        flags: &str,
        changed: Arc<Changed>,
    ) -> Result<Self, ScanError> {
        let mut connection = dialer.connect(address).await?;
        connection.set_response_timeout(SILENCE);
        // By the name of the key, or by that of the event: one of them does.
        let by_event = flags.contains('E');
        let pattern: &'static [u8] = if by_event { b"__keyevent@*__:*" } else { b"__keyspace@*__:*" };
        let (heard_out, heard) = watch::channel(Heard::default());
        // One who asks waits for the answer, so that one place is enough.
        let (ask, asks) = mpsc::channel(1);
        let task = tokio::spawn(listen(connection, pattern, by_event, changed, asks, heard_out));
        let mut events = Self { address: address.clone(), task, ask, heard };
        events.fence().await?;
        Ok(events)
    }

    /// Everything that the server had done when this was called has been told.
    pub async fn fence(&mut self) -> Result<(), ScanError> {
        let (number, told) = oneshot::channel();
        // An error means that the task is over, which says why.
        let _ = self.ask.send(number).await;
        let number = told.await.unwrap_or(u64::MAX);
        let heard = self.heard.wait_for(|heard| heard.answers >= number || heard.lost.is_some()).await;
        let why = match heard {
            Ok(heard) => heard.lost.clone(),
            Err(_) => Some("its task is over".to_owned()),
        };
        match why {
            None => Ok(()),
            Some(why) => Err(ScanError::Deaf { address: self.address.clone(), why }),
        }
    }

    /// Ends when nothing is heard any more.
    pub async fn lost(&mut self) -> ScanError {
        let why = match self.heard.wait_for(|heard| heard.lost.is_some()).await {
            Ok(heard) => heard.lost.clone().unwrap_or_default(),
            Err(_) => "its task is over".to_owned(),
        };
        ScanError::Deaf { address: self.address.clone(), why }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(
    mut connection: Connection,
    pattern: &'static [u8],
    by_event: bool,
    changed: Arc<Changed>,
    mut asks: mpsc::Receiver<oneshot::Sender<u64>>,
    heard: watch::Sender<Heard>,
) {
    let mut alive = tokio::time::interval(ALIVE);
    let mut sent = 0;
    let lost = loop {
        let (reply, asker) = tokio::select! {
            asked = asks.recv() => match asked {
                Some(asker) => (None, Some(asker)),
                None => return,
            },
            _ = alive.tick() => (None, None),
            reply = connection.receive() => (Some(reply), None),
        };
        let Some(reply) = reply else {
            connection.queue(&[b"PSUBSCRIBE".as_slice(), pattern]);
            if let Err(error) = connection.send_queued().await {
                break error.to_string();
            }
            sent += 1;
            if let Some(asker) = asker {
                // One who went away meanwhile does not wait for the answer.
                let _ = asker.send(sent);
            }
            continue;
        };
        match reply {
            Ok(Reply::Error(text)) => break String::from_utf8_lossy(&text).into_owned(),
            Ok(reply) => match reply.items() {
                [kind, _, channel, payload]
                    if kind.bytes().is_some_and(|kind| kind == b"pmessage".as_slice()) =>
                {
                    let (channel, payload) = (channel.bytes(), payload.bytes());
                    if let Some((db, key)) = channel.zip(payload).and_then(|(c, p)| named(c, p, by_event)) {
                        changed.add(db, key);
                    }
                }
                [kind, ..] if kind.bytes().is_some_and(|kind| kind == b"psubscribe".as_slice()) => {
                    heard.send_modify(|heard| heard.answers += 1);
                }
                _ => {}
            },
            Err(error) => break error.to_string(),
        }
    };
    heard.send_modify(|heard| heard.lost = Some(lost));
}

/// Database and key: `__keyevent@0__:del` with the key, or `__keyspace@0__:key` with the event.
fn named<'m>(channel: &'m [u8], payload: &'m [u8], by_event: bool) -> Option<(u32, &'m [u8])> {
    let rest = channel.strip_prefix(if by_event { b"__keyevent@" } else { b"__keyspace@" })?;
    let end = memchr::memmem::find(rest, b"__:")?;
    let db = std::str::from_utf8(rest.get(..end)?).ok()?.parse().ok()?;
    let name = rest.get(end + 3..)?;
    let (event, key) = if by_event { (name, payload) } else { (payload, name) };
    // A look at a key that is not there, such as our own.
    (event != b"keymiss").then_some((db, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_must_cover_every_kind_of_change() {
        for flags in ["AKE", "AE", "KA", "AEm"] {
            assert!(is_complete(flags), "{flags}");
        }
        for flags in ["", "A", "Ex", "KE", "Eg$lshzxe"] {
            assert!(!is_complete(flags), "{flags}");
        }
    }

    #[test]
    fn messages_name_database_and_key() {
        assert_eq!(named(b"__keyevent@3__:del", b"a__:b", true), Some((3, b"a__:b".as_slice())));
        assert_eq!(named(b"__keyspace@0__:a__:b", b"set", false), Some((0, b"a__:b".as_slice())));
        assert_eq!(named(b"__keyevent@0__:keymiss", b"a", true), None);
        assert_eq!(named(b"other", b"a", true), None);
    }
}
