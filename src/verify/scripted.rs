//! Which keys of the source a script leaves as they are: only those can be compared.

use std::sync::Arc;

use super::VerifyError;
use super::context::Context;
use super::expiry::Question;
use super::frame::Frame;
use super::keys::KeyArena;
use super::side::Links;
use crate::clock::unix_millis;
use crate::transform::script::{KeyChange, KeyFacts, Runner};

/// Asks the script about keys, and the source, over a connection of its own, what the script wants to know.
pub(super) struct Judge {
    context: Arc<Context>,
    runner: Runner,
    links: Links,
    node: usize,
    db: u64,
}

impl Judge {
    /// `None`: there is no script.
    pub fn new(context: &Arc<Context>, node: usize, db: u64) -> Result<Option<Self>, VerifyError> {
        let Some(script) = &context.script else { return Ok(None) };
        let links = context.source.links(db);
        Ok(Some(Self { context: Arc::clone(context), runner: script.runner()?, links, node, db }))
    }

    pub fn reset(&mut self) {
        self.links.reset();
    }

    /// Takes out the keys that the script names anew, changes or drops, and counts them.
    pub async fn retain_untouched(&mut self, keys: &mut KeyArena) -> Result<(), VerifyError> {
        let question = self.context.question;
        let wire = self.links.open(self.node).await?;
        for key in keys.iter() {
            wire.queue(&[b"TYPE", key]);
            wire.queue(&[question.command(), key]);
        }
        wire.send().await?;
        let mut left = KeyArena::default();
        let mut touched = 0;
        for key in keys.iter() {
            let refused = match wire.reply().await? {
                Frame::Simple(name) => Ok(type_name(name)),
                Frame::Error(text) => Err(text.to_vec()),
                _ => Ok(None),
            };
            let expiry = match wire.reply().await? {
                Frame::Integer(at) if at >= 0 => Some(at),
                _ => None,
            };
            let found = refused.map_err(|text| VerifyError::refused(wire.address(), b"TYPE", &text))?;
            // Gone by now.
            let Some(type_name) = found else { continue };
            let now = i64::try_from(unix_millis()).unwrap_or(i64::MAX);
            let expire_at_ms = match question {
                Question::Absolute => expiry,
                Question::Relative => expiry.map(|left| now.saturating_add(left)),
            };
            match self.runner.key(KeyFacts { db: self.db, key, type_name, expire_at_ms }) {
                Ok(KeyChange::Keep) => left.push(key),
                // What it failed at was set aside on the way.
                Ok(KeyChange::Drop | KeyChange::Change { .. }) | Err(_) => touched += 1,
            }
        }
        self.context.count_not_compared(touched);
        *keys = left;
        Ok(())
    }
}

/// As the snapshot tells it; `None`: there is no such key.
fn type_name(answer: &[u8]) -> Option<&'static str> {
    const KNOWN: [&str; 6] = ["string", "list", "set", "zset", "hash", "stream"];
    if answer == b"none" {
        return None;
    }
    Some(KNOWN.into_iter().find(|name| name.as_bytes() == answer).unwrap_or("module"))
}
