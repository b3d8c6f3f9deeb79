//! Databases of the source by number.

#[derive(Clone, Debug, Default)]
pub struct DatabaseFilter {
    /// `None`: all but the excluded. Sorted, none of them excluded.
    include: Option<Vec<u64>>,
    /// Sorted.
    exclude: Vec<u64>,
}

impl DatabaseFilter {
    /// No `include`: all.
    pub fn new(mut include: Vec<u64>, mut exclude: Vec<u64>) -> Self {
        exclude.sort_unstable();
        let all = include.is_empty();
        include.retain(|db| exclude.binary_search(db).is_err());
        include.sort_unstable();
        include.dedup();
        Self { include: (!all).then_some(include), exclude }
    }

    pub fn admits(&self, db: u64) -> bool {
        match &self.include {
            Some(include) => include.binary_search(&db).is_ok(),
            None => self.exclude.binary_search(&db).is_err(),
        }
    }

    pub fn is_open(&self) -> bool {
        self.include.is_none() && self.exclude.is_empty()
    }

    /// Those that are named; `None`: all but some.
    pub fn named(&self) -> Option<&[u64]> {
        self.include.as_deref()
    }

    pub fn excluded(&self) -> &[u64] {
        &self.exclude
    }
}
