//! One Lua state and the calls into it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use mlua::chunk::ChunkMode;
use mlua::{
    Either, Function, HookTriggers, IntoLua, Lua, LuaOptions, LuaString, StdLib, Table, Value, Variadic,
    VmState,
};

use super::{INSTRUCTIONS, MEMORY, NAME};
use crate::command::{CommandSpec, Kind, keys, lookup};
use crate::resp::{Args, array_header, bulk};

/// Instructions between two looks at how many there were.
const STEP: u32 = 1000;
/// Arguments that are handed over on the stack of Lua; more of them as a table.
const ON_STACK: usize = 200;

/// Basic functions that read files, load code, catch the errors that limits raise, hold what is to be let go, or
/// write to our output; and what is not the same in every run.
const FORBIDDEN: [&str; 11] = [
    "dofile",
    "loadfile",
    "load",
    "loadstring",
    "require",
    "collectgarbage",
    "print",
    "warn",
    "pcall",
    "xpcall",
    "coroutine",
];
const FORBIDDEN_OF_LIBRARIES: [(&str, &str); 3] =
    [("string", "dump"), ("math", "random"), ("math", "randomseed")];

/// `setmetatable` without finalizers, which run without limits. Lua looks for one only there.
const UNFINISHED: &str = "local set, get, kind, fail = setmetatable, rawget, type, error
    return function(t, meta)
        if kind(meta) == 'table' and get(meta, '__gc') ~= nil then
            fail('__gc is not allowed', 2)
        end
        return set(t, meta)
    end";

/// Makes the tables that the functions get: cheaper there than from here.
const CALLERS: &str = "local key, command, keys, setmetatable = ...
    local meta = {__index = function(c, name)
        if name == 'keys' then
            local found = keys()
            rawset(c, 'keys', found)
            return found
        end
    end}
    return key and function(db, name, type, expireAt)
        return key({db = db, key = name, type = type, expireAt = expireAt})
    end, command and function(db, name, args, ...)
        return command(setmetatable({db = db, name = name, args = args or {...}}, meta))
    end";

/// One Lua state. What it remembers from call to call must not matter: a resume begins with a new one.
#[derive(Debug)]
pub struct Runner {
    lua: Lua,
    key: Option<Function>,
    command: Option<Function>,
    /// Steps that the call at hand has taken.
    steps: Arc<AtomicU32>,
    /// Which arguments of the command at hand are keys, the first behind the name being 1.
    keys: Arc<Mutex<Vec<usize>>>,
}

/// What `key(k)` is told.
#[derive(Clone, Copy, Debug)]
pub struct KeyFacts<'a> {
    pub db: u64,
    pub key: &'a [u8],
    /// `string`, `list`, `set`, `zset`, `hash`, `stream` or `module`.
    pub type_name: &'a str,
    /// Unix ms.
    pub expire_at_ms: Option<i64>,
}

/// What becomes of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyChange {
    Keep,
    Drop,
    Change {
        key: Option<Vec<u8>>,
        /// Unix ms, or none at all; the outer `None`: as it is.
        expire_at_ms: Option<Option<i64>>,
        /// Its value goes as commands, through `command(c)`.
        rewrite: bool,
    },
}

/// What becomes of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandChange {
    Keep,
    Drop,
    /// So many commands were appended in its place.
    Replaced(u32),
}

struct Word<'a>(&'a [u8]);

impl IntoLua for Word<'_> {
    fn into_lua(self, lua: &Lua) -> mlua::Result<Value> {
        lua.create_string(self.0).map(Value::String)
    }
}

/// Text takes a shorter way than other bytes.
fn word(bytes: &[u8]) -> Either<&str, Word<'_>> {
    std::str::from_utf8(bytes).map_or(Either::Right(Word(bytes)), Either::Left)
}

impl Runner {
    pub(super) fn new(text: &str) -> Result<Self, String> {
        let steps = Arc::new(AtomicU32::new(0));
        let keys: Arc<Mutex<Vec<usize>>> = Arc::default();
        let made = || -> mlua::Result<Self> {
            let libraries = StdLib::STRING | StdLib::TABLE | StdLib::MATH | StdLib::UTF8;
            let lua = Lua::new_with(libraries, LuaOptions::default())?;
            let globals = lua.globals();
            for name in FORBIDDEN {
                globals.raw_set(name, Value::Nil)?;
            }
            let call = lua.load(UNFINISHED).set_mode(ChunkMode::Text).call::<Function>(())?;
            let setmetatable = globals.raw_get::<Function>("setmetatable")?;
            globals.raw_set("setmetatable", call)?;
            for (library, name) in FORBIDDEN_OF_LIBRARIES {
                globals.raw_get::<Table>(library)?.raw_set(name, Value::Nil)?;
            }
            lua.set_memory_limit(MEMORY)?;
            let counted = Arc::clone(&steps);
            let limited = HookTriggers::new().every_nth_instruction(STEP);
            lua.set_hook(limited, move |_, debug| {
                if counted.fetch_add(1, Ordering::Relaxed) < INSTRUCTIONS / STEP {
                    return Ok(VmState::Continue);
                }
                let line = debug.current_line().unwrap_or_default();
                Err(mlua::Error::runtime(format!(
                    "{NAME}:{line}: more than {INSTRUCTIONS} instructions in one call"
                )))
            })?;
            lua.load(text).set_name(format!("={NAME}")).set_mode(ChunkMode::Text).exec()?;
            let found = Arc::clone(&keys);
            let keys_of = lua.create_function(move |lua, ()| {
                let found = found.lock().unwrap_or_else(PoisonError::into_inner);
                lua.create_sequence_from(found.iter().copied())
            })?;
            let (key, command): (Option<Function>, Option<Function>) =
                (globals.get("key")?, globals.get("command")?);
            let (key, command) =
                lua.load(CALLERS).set_mode(ChunkMode::Text).call((key, command, keys_of, setmetatable))?;
            Ok(Self { lua, key, command, steps: Arc::clone(&steps), keys: Arc::clone(&keys) })
        };
        made().map_err(|error| said(&error))
    }

    pub fn judges_keys(&self) -> bool {
        self.key.is_some()
    }

    pub fn judges_commands(&self) -> bool {
        self.command.is_some()
    }

    /// Asks about a key of the snapshot. An error says what the script did wrong, with its line.
    pub fn key(&mut self, facts: KeyFacts<'_>) -> Result<KeyChange, String> {
        let Some(function) = &self.key else { return Ok(KeyChange::Keep) };
        self.steps.store(0, Ordering::Relaxed);
        let KeyFacts { db, key, type_name, expire_at_ms } = facts;
        let answer: Value =
            function.call((db, word(key), type_name, expire_at_ms)).map_err(|error| said(&error))?;
        match answer {
            Value::Nil | Value::Boolean(true) => Ok(KeyChange::Keep),
            Value::Boolean(false) => Ok(KeyChange::Drop),
            Value::Table(table) => key_change(&table, facts),
            other => Err(format!(
                "{NAME}: key returned a {}; allowed: nothing, true, false or a table",
                other.type_name()
            )),
        }
    }

    /// Asks about a command that is run in database `db` of the source.
    pub fn command(
        &mut self,
        spec: Option<&CommandSpec>,
        args: &Args<'_>,
        db: u64,
        out: &mut Vec<u8>,
    ) -> Result<CommandChange, String> {
        let Some(function) = &self.command else { return Ok(CommandChange::Keep) };
        self.steps.store(0, Ordering::Relaxed);
        {
            let mut found = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
            found.clear();
            // Keys that cannot be told are not among these.
            let _ = spec.map(|spec| keys(spec, args, &mut |index| found.push(index)));
        }
        let upper = args.name().to_ascii_uppercase();
        let words = args.iter().skip(1).map(word);
        let answer: mlua::Result<Value> = if args.len() <= ON_STACK {
            function.call((db, word(&upper), Value::Nil, words.collect::<Variadic<_>>()))
        } else {
            self.lua.create_sequence_from(words).and_then(|words| function.call((db, word(&upper), words)))
        };
        let start = out.len();
        let changed = match answer.map_err(|error| said(&error))? {
            Value::Nil | Value::Boolean(true) => return Ok(CommandChange::Keep),
            Value::Boolean(false) => return Ok(CommandChange::Drop),
            Value::Table(table) => self.commands(&table, &upper, db, out),
            other => Err(format!(
                "command returned a {}; allowed: nothing, true, false, a command or a list of commands",
                other.type_name()
            )),
        };
        changed.map_err(|why| {
            out.truncate(start);
            format!("{NAME}: {why}")
        })
    }

    /// One command, or a list of them.
    fn commands(
        &self,
        table: &Table,
        name: &[u8],
        db: u64,
        out: &mut Vec<u8>,
    ) -> Result<CommandChange, String> {
        let first: Value = table.raw_get(1).map_err(|error| said(&error))?;
        if !matches!(first, Value::Table(_)) {
            self.append(table, name, db, out)?;
            return Ok(CommandChange::Replaced(1));
        }
        let count = table.raw_len();
        for index in 1..=count {
            match table.raw_get(index).map_err(|error| said(&error))? {
                Value::Table(command) => self.append(&command, name, db, out)?,
                other => {
                    return Err(format!("item {index} of what command returned is a {}", other.type_name()));
                }
            }
        }
        Ok(CommandChange::Replaced(u32::try_from(count).unwrap_or(u32::MAX)))
    }

    /// `{name = …, args = {…}}`; without a name it is that of the command that was given.
    fn append(&self, command: &Table, given: &[u8], db: u64, out: &mut Vec<u8>) -> Result<(), String> {
        let failed = |error: mlua::Error| said(&error);
        if let Some(other) = command.raw_get::<Option<u64>>("db").map_err(failed)?
            && other != db
        {
            return Err("command cannot bring a command to another database; spec.databaseMap can".to_owned());
        }
        let name: Option<LuaString> = command.raw_get("name").map_err(failed)?;
        let args: Option<Table> = command.raw_get("args").map_err(failed)?;
        let Some(args) = args else { return Err("a command that was returned has no args".to_owned()) };
        let name = name.as_ref().map(LuaString::as_bytes);
        let name: &[u8] = name.as_deref().unwrap_or(given);
        let kind = lookup(name).map(|spec| spec.kind);
        if name.is_empty()
            || matches!(kind, Some(Kind::Select | Kind::Multi | Kind::Exec | Kind::TopologyChange))
        {
            return Err(format!(
                "command returned a command {:?}, which it may not",
                name.escape_ascii().to_string()
            ));
        }
        let count = args.raw_len();
        array_header(1 + count, out);
        bulk(name, out);
        for index in 1..=count {
            match args.raw_get(index).map_err(failed)? {
                Value::String(word) => bulk(&word.as_bytes(), out),
                Value::Integer(number) => bulk(itoa::Buffer::new().format(number).as_bytes(), out),
                number @ Value::Number(_) => match self.lua.coerce_string(number).map_err(failed)? {
                    Some(word) => bulk(&word.as_bytes(), out),
                    None => return Err(format!("argument {index} is no string")),
                },
                other => {
                    return Err(format!(
                        "argument {index} of a command that was returned is a {}; allowed: strings and numbers",
                        other.type_name()
                    ));
                }
            }
        }
        Ok(())
    }
}

fn key_change(table: &Table, facts: KeyFacts<'_>) -> Result<KeyChange, String> {
    let (mut key, mut expire_at_ms, mut rewrite) = (None, None, false);
    for pair in table.pairs::<LuaString, Value>() {
        let (field, value) = pair.map_err(|error| format!("{NAME}: {}", said(&error)))?;
        let field = field.as_bytes();
        match (&*field, value) {
            (b"key", Value::String(name)) => {
                let name = name.as_bytes();
                key = (*name != *facts.key).then(|| name.to_vec());
            }
            (b"expireAt", Value::Integer(at)) => {
                expire_at_ms = (Some(at) != facts.expire_at_ms).then_some(Some(at));
            }
            (b"expireAt", Value::Boolean(false)) => {
                expire_at_ms = facts.expire_at_ms.is_some().then_some(None);
            }
            (b"rewrite", Value::Boolean(asked)) => rewrite = asked,
            (b"db", Value::Integer(db)) if u64::try_from(db) == Ok(facts.db) => {}
            (b"type", Value::String(name)) if *name.as_bytes() == *facts.type_name.as_bytes() => {}
            (other, value) => {
                return Err(format!(
                    "{NAME}: key returned {} = {}; allowed: key (a string), expireAt (Unix ms, or false for none), rewrite (true or false)",
                    other.escape_ascii(),
                    value.type_name()
                ));
            }
        }
    }
    if key.is_none() && expire_at_ms.is_none() && !rewrite {
        return Ok(KeyChange::Keep);
    }
    Ok(KeyChange::Change { key, expire_at_ms, rewrite })
}

/// The first line of what Lua says, which names the script's line.
fn said(error: &mlua::Error) -> String {
    let text = match error {
        mlua::Error::CallbackError { cause, .. } => return said(cause),
        mlua::Error::RuntimeError(text) | mlua::Error::MemoryError(text) => text.clone(),
        mlua::Error::SyntaxError { message, .. } => message.clone(),
        other => other.to_string(),
    };
    text.lines().next().unwrap_or_default().to_owned()
}
