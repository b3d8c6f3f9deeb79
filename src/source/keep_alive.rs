//! A replica that says nothing for `repl-timeout` is dropped, also while it waits for room.

use std::pin::pin;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::Interval;

/// Sends `frame` at each tick of the timer until the work is done.
pub async fn while_sending<T>(
    frame: &[u8],
    timer: &mut Interval,
    write: &mut (impl AsyncWrite + Unpin),
    work: impl Future<Output = T>,
) -> std::io::Result<T> {
    let mut work = pin!(work);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return Ok(done),
            _ = timer.tick() => write.write_all(frame).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::spool::{Origin, SpoolLimits, spool};

    #[tokio::test]
    async fn a_link_whose_spool_is_full_goes_on_acknowledging() {
        let folder = tempfile::tempdir().unwrap();
        let limits = SpoolLimits { memory: 0, disk: 0, retain: 0, folder: folder.path().join("spool") };
        let (mut writer, mut reader) = spool(limits);
        writer.begin(Origin::unnamed(), true);
        let (mut ours, mut theirs) = tokio::io::duplex(1 << 20);
        let mut timer = tokio::time::interval(Duration::from_millis(5));
        let sent = vec![7; 1 << 20];
        let append = while_sending(b"ack", &mut timer, &mut ours, writer.append(&sent, 0));
        let source = async {
            let mut heard = [0; 30];
            // Nothing is let go before ten were heard.
            theirs.read_exact(&mut heard).await.unwrap();
            assert!(reader.gauges().full && heard.starts_with(b"ackack"));
            let mut read = 0;
            while read < sent.len() as u64 {
                if let crate::spool::Next::Block(block) = reader.next().await.unwrap() {
                    read = block.position + block.bytes.len() as u64;
                    reader.applied(read);
                }
            }
        };
        let both = async { tokio::join!(append, source).0 };
        tokio::time::timeout(Duration::from_secs(20), both).await.unwrap().unwrap().unwrap();
    }
}
