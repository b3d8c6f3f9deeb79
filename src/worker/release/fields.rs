//! Expiries of hash fields.

use std::collections::BTreeMap;

use super::sweep::{NodeSweep, Page, elements, keyspaces};
use crate::connection::ConnectionError;
use crate::hold::true_field;
use crate::resp::Reply;

/// Hashes that SCAN looks for at a time.
const HASHES: &[u8] = b"500";
/// Fields of a hash at a time.
const FIELDS: &[u8] = b"500";

type Key = Vec<u8>;

impl NodeSweep {
    /// Gives all fields of the node's hashes their true times.
    pub async fn fields(&mut self) -> Result<Page, ConnectionError> {
        let mut page = Page::default();
        for keyspace in keyspaces(&mut self.connection).await? {
            if !keyspace.fields {
                continue;
            }
            self.select(keyspace.db).await?;
            let mut cursor = b"0".to_vec();
            loop {
                let args: [&[u8]; 6] = [b"SCAN", &cursor, b"COUNT", HASHES, b"TYPE", b"hash"];
                let (next, keys) = self.scan(&args).await?;
                self.hashes(keys, &mut page).await?;
                if next == b"0" {
                    break;
                }
                cursor = next;
            }
        }
        Ok(page)
    }

    async fn hashes(&mut self, keys: Vec<Key>, page: &mut Page) -> Result<(), ConnectionError> {
        let mut open: Vec<(Key, Vec<u8>)> = keys.into_iter().map(|key| (key, b"0".to_vec())).collect();
        while !open.is_empty() {
            for (key, cursor) in &open {
                self.connection.queue(&[b"HSCAN".as_slice(), key, cursor, b"COUNT", FIELDS, b"NOVALUES"]);
            }
            let replies = self.replies(open.len()).await?;
            let mut found: Vec<(Key, Vec<Key>)> = Vec::with_capacity(open.len());
            let mut more = Vec::new();
            for ((key, _), reply) in open.into_iter().zip(replies) {
                let Some((next, fields)) = elements(&reply) else {
                    page.missed |= self.is_elsewhere(b"HSCAN", &reply)?;
                    continue;
                };
                if next != b"0" {
                    more.push((key.clone(), next));
                }
                if !fields.is_empty() {
                    found.push((key, fields));
                }
            }
            self.release_fields(&found, page).await?;
            open = more;
        }
        Ok(())
    }

    async fn release_fields(
        &mut self,
        found: &[(Key, Vec<Key>)],
        page: &mut Page,
    ) -> Result<(), ConnectionError> {
        for (key, fields) in found {
            self.queue_fields(&[b"HPEXPIRETIME", key], fields.iter());
        }
        let replies = self.replies(found.len()).await?;
        let mut asked = Vec::new();
        for ((key, fields), reply) in found.iter().zip(replies) {
            let Reply::Array(Some(times)) = &reply else {
                page.missed |= self.is_elsewhere(b"HPEXPIRETIME", &reply)?;
                continue;
            };
            let mut same: BTreeMap<i64, Vec<&Key>> = BTreeMap::new();
            for (field, time) in fields.iter().zip(times) {
                if let Reply::Integer(at) = time
                    && let Some(at) = true_field(*at)
                {
                    same.entry(at).or_default().push(field);
                }
            }
            for (at, fields) in same {
                let mut digits = itoa::Buffer::new();
                let words: [&[u8]; 3] = [b"HPEXPIREAT", key, digits.format(at.max(1)).as_bytes()];
                self.queue_fields(&words, fields.iter().copied());
                asked.push(fields.len() as u64);
            }
        }
        let replies = self.replies(asked.len()).await?;
        for (count, reply) in asked.into_iter().zip(replies) {
            match reply {
                Reply::Array(_) => page.released += count,
                reply => page.missed |= self.is_elsewhere(b"HPEXPIREAT", &reply)?,
            }
        }
        Ok(())
    }

    fn queue_fields<'k>(&mut self, words: &[&[u8]], fields: impl ExactSizeIterator<Item = &'k Key>) {
        let count = fields.len().to_string();
        let mut args: Vec<&[u8]> = Vec::with_capacity(words.len() + 2 + fields.len());
        words.iter().for_each(|word| args.push(word));
        args.push(b"FIELDS");
        args.push(count.as_bytes());
        fields.for_each(|field| args.push(field));
        self.connection.queue(&args);
    }
}
