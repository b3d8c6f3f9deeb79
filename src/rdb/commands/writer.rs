//! A command whose number of arguments is known only at its end.

use crate::resp::{array_header, bulk};

/// Arguments collected for one command. Kept between commands for its memory.
#[derive(Debug, Default)]
pub(super) struct Batch {
    body: Vec<u8>,
    args: usize,
    /// Elements so far, as the user of the batch counts them.
    pub elements: usize,
}

impl Batch {
    pub fn begin(&mut self, args: &[&[u8]]) {
        self.body.clear();
        self.args = 0;
        args.iter().for_each(|arg| self.arg(arg));
    }

    #[inline]
    pub fn arg(&mut self, arg: &[u8]) {
        bulk(arg, &mut self.body);
        self.args += 1;
    }

    /// Encoded bytes so far.
    pub fn len(&self) -> usize {
        self.body.len()
    }

    /// Appends the command and begins anew.
    pub fn flush(&mut self, out: &mut Vec<u8>) {
        array_header(self.args, out);
        out.extend_from_slice(&self.body);
        self.body.clear();
        self.args = 0;
        self.elements = 0;
    }
}
