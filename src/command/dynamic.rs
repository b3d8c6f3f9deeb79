//! Commands that only the source knows, from its `COMMAND` reply: those of modules.
//! Reply format: Redis documentation, pages "COMMAND" and "Command key specifications".

use std::borrow::Cow;
use std::collections::HashMap;

use super::{Begin, Class, CommandError, CommandSpec, Find, KeyRule, KeySpec};
use crate::resp::{Args, Reply};

/// Ask [`super::lookup`] first: `COMMAND` is wrong about some built-in commands.
#[derive(Clone, Debug, Default)]
pub struct DynamicTable {
    /// Upper-case name, `PARENT|SUB` for subcommands.
    specs: HashMap<Box<[u8]>, CommandSpec>,
}

/// No server has a longer command name; longer ones are not looked up.
const LONGEST_NAME: usize = 96;

impl DynamicTable {
    /// Reads the reply to `COMMAND`, any version. Every command of it is [`Class::Guarded`].
    pub fn from_reply(reply: &Reply) -> Result<Self, CommandError> {
        let Reply::Array(Some(entries)) = reply else {
            return Err(CommandError::BadCommandReply { entry: 0, fault: "the reply is not an array" });
        };
        let mut table = Self::default();
        for (entry, reply) in entries.iter().enumerate() {
            // A null entry stands for a command that COMMAND INFO does not know.
            if !matches!(reply, Reply::Array(None)) {
                let bad = |fault| CommandError::BadCommandReply { entry, fault };
                table.add(reply, None).map_err(bad)?;
            }
        }
        Ok(table)
    }

    /// The specification of the command in `args`, by subcommand where the server told them apart.
    pub fn lookup(&self, args: &Args) -> Option<&CommandSpec> {
        let mut name = [0u8; LONGEST_NAME];
        let parent = args.name();
        let end = append(&mut name, 0, parent)?;
        if let Some(sub) = args.arg(1)
            && let Some(end) = append(&mut name, end, b"|").and_then(|end| append(&mut name, end, sub))
            && let Some(spec) = self.specs.get(name.get(..end)?)
        {
            return Some(spec);
        }
        self.specs.get(name.get(..end)?)
    }

    pub fn is_empty(&self) -> bool {
        self.specs.is_empty()
    }

    fn add(&mut self, reply: &Reply, parent: Option<&str>) -> Result<(), &'static str> {
        let Reply::Array(Some(fields)) = reply else { return Err("it is not an array") };
        let name = fields.first().and_then(text).ok_or("it has no name")?.to_ascii_uppercase();
        let name = match parent {
            // Redis writes the parent's name into the subcommand's, some servers do not.
            Some(parent) if !name.contains('|') => format!("{parent}|{name}"),
            _ => name,
        };
        let arity = fields.get(1).and_then(number).ok_or("it has no arity")?;
        let arity = i16::try_from(arity).map_err(|_| "its arity is out of range")?;
        let keys = key_spec(fields)?;
        if parent.is_none()
            && let Some(Reply::Array(Some(subcommands))) = fields.get(9)
        {
            for subcommand in subcommands {
                self.add(subcommand, Some(&name))?;
            }
        }
        let spec = CommandSpec::new(Cow::Owned(name.clone()), arity, keys, Class::Guarded);
        self.specs.insert(name.into_bytes().into_boxed_slice(), spec);
        Ok(())
    }
}

fn append(buffer: &mut [u8; LONGEST_NAME], at: usize, bytes: &[u8]) -> Option<usize> {
    let end = at.checked_add(bytes.len())?;
    let place = buffer.get_mut(at..end)?;
    place.copy_from_slice(bytes);
    place.make_ascii_uppercase();
    Some(end)
}

/// The key specifications where they tell everything; the triple where the server says that it does;
/// otherwise unknown. `movablekeys` with a plain triple or an incomplete specification tells too little.
fn key_spec(fields: &[Reply]) -> Result<KeySpec, &'static str> {
    let movable = items(fields.get(2)).any(|flag| text(flag) == Some("movablekeys"));
    if items(fields.get(8)).next().is_none() {
        return if movable { Ok(KeySpec::Unknown) } else { triple(fields) };
    }
    let rules: Option<Vec<KeyRule>> = items(fields.get(8)).filter_map(key_rule).collect();
    Ok(match rules {
        // All it names are channels; the triple of SPUBLISH counts them as keys.
        Some(rules) if rules.is_empty() => KeySpec::None,
        // Derived from the triple, and then as incomplete.
        Some(rules) if movable && rules.iter().all(is_plain) => KeySpec::Unknown,
        Some(rules) => KeySpec::Rules(rules),
        None => KeySpec::Unknown,
    })
}

fn is_plain(rule: &KeyRule) -> bool {
    matches!(rule, KeyRule { begin: Begin::Index(_), find: Find::Range { .. } })
}

/// First, last, step.
fn triple(fields: &[Reply]) -> Result<KeySpec, &'static str> {
    let position = |at: usize| fields.get(at).and_then(number).ok_or("its key positions are missing");
    let (first, last, step) = (position(3)?, position(4)?, position(5)?);
    if first == 0 {
        return Ok(KeySpec::None);
    }
    let out_of_range = |_| "its key positions are out of range";
    Ok(KeySpec::Range {
        first: u16::try_from(first).map_err(out_of_range)?,
        last: i16::try_from(last).map_err(out_of_range)?,
        step: u16::try_from(step).map_err(out_of_range)?,
    })
}

/// `None`: the specification names no key (`not_key`). `Some(None)`: it does not tell enough.
fn key_rule(reply: &Reply) -> Option<Option<KeyRule>> {
    let flags = || items(field(reply, "flags")).filter_map(text);
    if flags().any(|flag| flag.eq_ignore_ascii_case("not_key")) {
        return None;
    }
    if flags().any(|flag| flag.eq_ignore_ascii_case("incomplete")) {
        return Some(None);
    }
    Some(complete_rule(reply))
}

fn complete_rule(reply: &Reply) -> Option<KeyRule> {
    let begin = field(reply, "begin_search")?;
    let from = field(begin, "spec")?;
    let begin = match text(field(begin, "type")?)? {
        "index" => Begin::Index(unsigned(field(from, "index")?)?),
        "keyword" => Begin::Keyword {
            word: text(field(from, "keyword")?)?.as_bytes().to_vec(),
            from: signed(field(from, "startfrom")?)?,
        },
        _ => return None,
    };
    let find = field(reply, "find_keys")?;
    let how = field(find, "spec")?;
    let find = match text(field(find, "type")?)? {
        "range" => Find::Range {
            last: signed(field(how, "lastkey")?)?,
            step: unsigned(field(how, "keystep")?)?,
            limit: unsigned(field(how, "limit")?)?,
        },
        "keynum" => Find::Counted {
            count: unsigned(field(how, "keynumidx")?)?,
            first: unsigned(field(how, "firstkey")?)?,
            step: unsigned(field(how, "keystep")?)?,
        },
        _ => return None,
    };
    Some(KeyRule { begin, find })
}

/// The value behind `name` in a map that RESP2 flattens into an array.
fn field<'a>(map: &'a Reply, name: &str) -> Option<&'a Reply> {
    let Reply::Array(Some(flat)) = map else { return None };
    let pairs = flat.as_chunks::<2>().0;
    pairs.iter().find(|[key, _]| text(key) == Some(name)).map(|[_, value]| value)
}

fn items(reply: Option<&Reply>) -> impl Iterator<Item = &Reply> {
    match reply {
        Some(Reply::Array(Some(items))) => items.iter(),
        _ => [].iter(),
    }
}

fn text(reply: &Reply) -> Option<&str> {
    match reply {
        Reply::Simple(bytes) | Reply::Bulk(Some(bytes)) => std::str::from_utf8(bytes).ok(),
        _ => None,
    }
}

fn number(reply: &Reply) -> Option<i64> {
    match reply {
        Reply::Integer(number) => Some(*number),
        _ => None,
    }
}

fn signed(reply: &Reply) -> Option<i32> {
    number(reply).and_then(|number| number.try_into().ok())
}

fn unsigned(reply: &Reply) -> Option<u32> {
    number(reply).and_then(|number| number.try_into().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::keys;
    use crate::command::test_args::TestArgs;
    use bytes::Bytes;
    use proptest::prelude::*;

    fn simple(text: &str) -> Reply {
        Reply::Simple(Bytes::copy_from_slice(text.as_bytes()))
    }

    fn array<const N: usize>(items: [Reply; N]) -> Reply {
        Reply::Array(Some(items.into()))
    }

    fn map<const N: usize>(pairs: [(&str, Reply); N]) -> Reply {
        Reply::Array(Some(pairs.into_iter().flat_map(|(key, value)| [simple(key), value]).collect()))
    }

    /// An entry as Redis ≤ 5 sends it.
    fn old_entry(name: &str, flags: &[&str], triple: [i64; 3]) -> Reply {
        let [first, last, step] = triple.map(Reply::Integer);
        let flags = Reply::Array(Some(flags.iter().map(|flag| simple(flag)).collect()));
        array([simple(name), Reply::Integer(-2), flags, first, last, step])
    }

    fn new_entry(name: &str, flags: &[&str], triple: [i64; 3], rules: Vec<Reply>, subs: Vec<Reply>) -> Reply {
        let Reply::Array(Some(mut fields)) = old_entry(name, flags, triple) else { unreachable!() };
        fields.extend([array([]), array([]), Reply::Array(Some(rules)), Reply::Array(Some(subs))]);
        Reply::Array(Some(fields))
    }

    fn rule(flag: &str, begin: Reply, find: Reply) -> Reply {
        map([("flags", array([simple(flag)])), ("begin_search", begin), ("find_keys", find)])
    }

    fn index(index: i64) -> Reply {
        map([("type", simple("index")), ("spec", map([("index", Reply::Integer(index))]))])
    }

    fn range(last: i64, step: i64, limit: i64) -> Reply {
        let spec = map([
            ("lastkey", Reply::Integer(last)),
            ("keystep", Reply::Integer(step)),
            ("limit", Reply::Integer(limit)),
        ]);
        map([("type", simple("range")), ("spec", spec)])
    }

    fn keynum() -> Reply {
        let spec = map([
            ("keynumidx", Reply::Integer(0)),
            ("firstkey", Reply::Integer(1)),
            ("keystep", Reply::Integer(1)),
        ]);
        map([("type", simple("keynum")), ("spec", spec)])
    }

    fn keyword(word: &str, from: i64) -> Reply {
        let spec = map([("keyword", simple(word)), ("startfrom", Reply::Integer(from))]);
        map([("type", simple("keyword")), ("spec", spec)])
    }

    fn found(table: &DynamicTable, command: &str) -> Result<Vec<usize>, CommandError> {
        let args = TestArgs::new(command);
        let mut indexes = Vec::new();
        keys(table.lookup(&args.args()).unwrap(), &args.args(), &mut |index| indexes.push(index))?;
        Ok(indexes)
    }

    #[test]
    fn triples_of_old_servers() {
        let table = DynamicTable::from_reply(&array([
            old_entry("json.set", &["write"], [1, 1, 1]),
            old_entry("json.mget", &["readonly"], [1, -2, 1]),
            old_entry("mod.movable", &["write", "movablekeys"], [1, 1, 1]),
            old_entry("mod.none", &["write"], [0, 0, 0]),
            Reply::Array(None),
        ]))
        .unwrap();
        assert_eq!(found(&table, "Json.Set doc $ 1"), Ok(vec![1]));
        assert_eq!(found(&table, "JSON.MGET a b c $"), Ok(vec![1, 2, 3]));
        assert_eq!(found(&table, "mod.none a"), Ok(vec![]));
        assert_eq!(
            found(&table, "mod.movable a"),
            Err(CommandError::KeysUnknown { command: "MOD.MOVABLE".into() })
        );
        assert!(table.lookup(&TestArgs::new("json.del a").args()).is_none());
        assert!(table.lookup(&TestArgs::new(&"x".repeat(500)).args()).is_none());
    }

    #[test]
    fn key_specifications_of_new_servers() {
        let table = DynamicTable::from_reply(&array([
            new_entry(
                "m.store",
                &["write", "movablekeys"],
                [1, 1, 1],
                vec![rule("OW", index(1), range(0, 1, 0)), rule("RO", index(2), keynum())],
                vec![],
            ),
            new_entry(
                "m.kw",
                &["write", "movablekeys"],
                [1, 1, 1],
                vec![rule("RO", index(1), range(0, 1, 0)), rule("OW", keyword("STORE", 2), range(0, 1, 0))],
                vec![],
            ),
            new_entry(
                "m.half",
                &["readonly", "movablekeys"],
                [0, 0, 0],
                vec![rule("RO", keyword("STREAMS", 1), range(-1, 1, 2))],
                vec![],
            ),
            new_entry(
                "m.incomplete",
                &["write", "movablekeys"],
                [1, 1, 1],
                vec![rule("incomplete", index(1), range(0, 1, 0))],
                vec![],
            ),
            new_entry(
                "m.channel",
                &["pubsub"],
                [1, 1, 1],
                vec![rule("not_key", index(1), range(0, 1, 0))],
                vec![],
            ),
            new_entry(
                "m.group",
                &["write"],
                [0, 0, 0],
                vec![],
                vec![new_entry(
                    "m.group|create",
                    &["write"],
                    [2, 2, 1],
                    vec![rule("RW", index(2), range(0, 1, 0))],
                    vec![],
                )],
            ),
        ]))
        .unwrap();
        assert_eq!(found(&table, "m.store dest 2 a b weights 1 2"), Ok(vec![1, 3, 4]));
        assert_eq!(found(&table, "m.kw a x store d"), Ok(vec![1, 4]));
        assert_eq!(found(&table, "m.kw a x"), Ok(vec![1]));
        assert_eq!(found(&table, "m.half count 1 streams a b 0 0"), Ok(vec![4, 5]));
        assert!(matches!(found(&table, "m.incomplete a"), Err(CommandError::KeysUnknown { .. })));
        assert_eq!(found(&table, "m.channel c"), Ok(vec![]));
        assert_eq!(found(&table, "m.group Create key g"), Ok(vec![2]));
        assert_eq!(found(&table, "m.group help"), Ok(vec![]));
        assert_eq!(
            found(&table, "m.store dest 3 a b"),
            Err(CommandError::BadKeyCount { command: "M.STORE".into(), index: 2 })
        );
    }

    #[test]
    fn a_reply_of_another_form_is_refused() {
        assert!(DynamicTable::from_reply(&simple("OK")).is_err());
        for entry in [simple("x"), array([]), array([simple("x")]), old_entry("x", &[], [70000, 1, 1])] {
            assert!(matches!(
                DynamicTable::from_reply(&array([old_entry("ok", &[], [1, 1, 1]), entry])),
                Err(CommandError::BadCommandReply { entry: 1, .. })
            ));
        }
    }

    proptest! {
        #[test]
        fn any_rule_on_any_arguments_stays_within_them(
            (index, last, step, limit) in (0u32..9, -9i32..9, 0u32..4, 0u32..4),
            from in -9i32..9,
            words in prop::collection::vec("[0-9a-b]{1,2}|k", 1..9),
        ) {
            let begins = [Begin::Index(index), Begin::Keyword { word: b"K".to_vec(), from }];
            let finds = [
                Find::Range { last, step, limit },
                Find::Counted { count: limit, first: step, step: index },
            ];
            let args = TestArgs::new(&words.join(" "));
            for begin in &begins {
                for find in &finds {
                    let rules = KeySpec::Rules(vec![KeyRule { begin: begin.clone(), find: find.clone() }]);
                    let spec = CommandSpec::new("X".into(), -1, rules, Class::Guarded);
                    let mut within = true;
                    let _ = keys(&spec, &args.args(), &mut |at| within &= at < words.len());
                    prop_assert!(within);
                }
            }
        }
    }
}
