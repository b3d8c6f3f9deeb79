//! Commands through the filter of the spec.

use super::{Onward, Stream, Taken, refused};
use crate::command::{CommandSpec, lookup};
use crate::resp::frame::{Parsed, parse_frame};
use crate::resp::{Args, encode_command};
use crate::transform::{Transform, Verdict};

impl Stream {
    /// Follows what the filter leaves of a command.
    pub(super) fn filter<S>(
        &mut self,
        transform: &Transform,
        known: Option<&CommandSpec>,
        args: &Args<'_>,
        to: &mut Onward<'_, S>,
    ) -> Taken {
        let mut narrowed = std::mem::take(&mut self.narrowed);
        narrowed.clear();
        let taken = match transform.command(known, args, self.place.db, &mut narrowed) {
            Verdict::Keep => self.follow(known, args, to),
            Verdict::Drop => {
                *to.filtered += 1;
                Taken::Done { commands: 0 }
            }
            Verdict::Changed => {
                *to.filtered += 1;
                self.follow_frame(&narrowed, to)
            }
            Verdict::FlushEach(databases) => {
                *to.filtered += 1;
                self.flush_each(&databases, args, to)
            }
            Verdict::Refused(why) => refused(args, why),
        };
        self.narrowed = narrowed;
        taken
    }

    fn follow_frame<S>(&mut self, frame: &[u8], to: &mut Onward<'_, S>) -> Taken {
        let mut spans = Vec::new();
        match parse_frame(frame, &mut spans) {
            Ok(Parsed::Command(_)) => {
                let args = Args { frame, spans: &spans };
                self.follow(lookup(args.name()), &args, to)
            }
            // Our own frames can be parsed.
            _ => Taken::Done { commands: 0 },
        }
    }

    /// FLUSHALL, of some databases of the source only.
    fn flush_each<S>(&mut self, databases: &[u64], args: &Args<'_>, to: &mut Onward<'_, S>) -> Taken {
        let mut targets: Vec<u64> = databases.iter().map(|db| to.target_db(*db)).collect();
        targets.sort_unstable();
        targets.dedup();
        if to.router.is_cluster() && targets.len() > 1 {
            return refused(
                args,
                "some databases are left out, and a cluster is emptied one database at a time",
            );
        }
        let mut words = vec![b"FLUSHDB".as_slice()];
        words.extend(args.arg(1));
        let mut frame = Vec::new();
        encode_command(&words, &mut frame);
        let (here, mut taken) = (self.place.db, Taken::Done { commands: 0 });
        for target in targets {
            if let Some(db) = databases.iter().find(|db| to.target_db(**db) == target) {
                self.place.db = *db;
                taken = self.follow_frame(&frame, to);
                if matches!(taken, Taken::Refused { .. }) {
                    break;
                }
            }
        }
        self.place.db = here;
        taken
    }
}
