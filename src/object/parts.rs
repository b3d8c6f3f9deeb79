//! A file that goes to a store in parts: few of them in memory, and never more than a store takes.

use bytes::{Bytes, BytesMut};
use object_store::MultipartUpload;
use tokio::task::JoinSet;

/// Bytes of the first parts, and parts that are under way at once.
const PART: usize = 8 << 20;
const UNDER_WAY: usize = 2;
/// S3 takes no more, and no greater ones.
const MOST_PARTS: usize = 10_000;
const GREATEST: usize = 5 << 30;

/// Bytes of the part with this number, from 0: twice as many whenever half of the parts that were left are used, so
/// that a file of 80 GB goes in parts of 16 MiB at most, and one of 450 GB goes, too.
fn size_of(number: usize) -> usize {
    let left = MOST_PARTS.saturating_sub(number).max(1);
    let halved = (MOST_PARTS / left).ilog2();
    PART.checked_shl(halved).unwrap_or(GREATEST).min(GREATEST)
}

pub struct Parts {
    upload: Box<dyn MultipartUpload>,
    /// Less than a part.
    waiting: BytesMut,
    begun: usize,
    under_way: JoinSet<object_store::Result<()>>,
}

impl Parts {
    pub fn new(upload: Box<dyn MultipartUpload>) -> Self {
        Self { upload, waiting: BytesMut::new(), begun: 0, under_way: JoinSet::new() }
    }

    pub async fn put(&mut self, mut bytes: Bytes) -> object_store::Result<()> {
        while !bytes.is_empty() {
            let size = size_of(self.begun);
            let room = size.saturating_sub(self.waiting.len()).min(bytes.len());
            self.waiting.extend_from_slice(&bytes.split_to(room));
            if self.waiting.len() >= size {
                self.send().await?;
            }
        }
        Ok(())
    }

    async fn send(&mut self) -> object_store::Result<()> {
        while self.under_way.len() >= UNDER_WAY {
            self.arrived().await?;
        }
        let part = self.waiting.split().freeze();
        self.begun += 1;
        self.under_way.spawn(self.upload.put_part(part.into()));
        Ok(())
    }

    async fn arrived(&mut self) -> object_store::Result<()> {
        match self.under_way.join_next().await {
            Some(Ok(sent)) => sent,
            Some(Err(source)) => Err(object_store::Error::JoinError { source }),
            None => Ok(()),
        }
    }

    /// Whatever fails, no part is left.
    pub async fn finish(mut self) -> object_store::Result<()> {
        let whole = async {
            if !self.waiting.is_empty() {
                self.send().await?;
            }
            while !self.under_way.is_empty() {
                self.arrived().await?;
            }
            self.upload.complete().await.map(drop)
        };
        let whole = whole.await;
        if whole.is_err() {
            let _ = self.abort().await;
        }
        whole
    }

    pub async fn abort(mut self) -> object_store::Result<()> {
        self.under_way.shutdown().await;
        self.upload.abort().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;
    use object_store::path::Path;

    #[test]
    fn large_files_fit_and_small_ones_take_little_memory() {
        let sizes: Vec<usize> = (0..MOST_PARTS).map(size_of).collect();
        assert_eq!((sizes[0], sizes[4999], sizes[5000], sizes[7499]), (PART, PART, 2 * PART, 2 * PART));
        assert!(sizes.is_sorted());
        assert!(sizes.iter().sum::<usize>() > 450_000_000_000);
        assert!(*sizes.last().unwrap() <= GREATEST && size_of(usize::MAX) <= GREATEST);
    }

    #[tokio::test]
    async fn what_is_put_is_there_in_its_order() {
        let (store, path) = (InMemory::new(), Path::from("file"));
        let mut parts = Parts::new(store.put_multipart(&path).await.unwrap());
        let mut all = Vec::new();
        for (length, byte) in [(PART - 1, 1), (1, 2), (0, 3), (3 * PART + 7, 4), (5, 5)] {
            all.extend(std::iter::repeat_n(byte, length));
            parts.put(Bytes::from(vec![byte; length])).await.unwrap();
        }
        parts.finish().await.unwrap();
        assert!(store.get(&path).await.unwrap().bytes().await.unwrap() == all);
    }
}
