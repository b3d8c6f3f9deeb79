use super::*;
use crate::command::lookup;
use crate::command::test_args::{TestArgs, printed};

fn runner(text: &str) -> Runner {
    Script::new(text, false).unwrap().runner().unwrap()
}

fn commanded(text: &str, command: &str) -> String {
    let args = TestArgs::new(command);
    let args = args.args();
    let mut out = b"before".to_vec();
    let changed = runner(text).command(lookup(args.name()), &args, 3, &mut out);
    assert_eq!(&out[..6], b"before");
    match changed {
        Ok(CommandChange::Keep) => "keep".to_owned(),
        Ok(CommandChange::Drop) => "drop".to_owned(),
        Ok(CommandChange::Replaced(count)) => {
            let printed = printed(&out[6..]);
            assert_eq!(printed.len(), count as usize);
            printed.join("; ")
        }
        Err(why) => {
            assert_eq!(out.len(), 6, "what was written before the error is taken back");
            why
        }
    }
}

#[test]
fn commands_are_kept_dropped_changed_and_multiplied() {
    for (body, command, expected) in [
        ("", "SET a 1", "keep"),
        ("return true", "SET a 1", "keep"),
        ("return false", "SET a 1", "drop"),
        ("return c", "set a 1", "SET a 1"),
        ("c.args[1] = 'new:' .. c.args[1] return c", "SET a 1", "SET new:a 1"),
        (
            "for _, i in ipairs(c.keys) do c.args[i] = 'n' .. c.args[i] end return c",
            "MSET a 1 b 2",
            "MSET na 1 nb 2",
        ),
        ("return {name = 'DEL', args = {c.args[1], 5, 2.5}}", "SET a 1", "DEL a 5 2.5"),
        (
            "return {{args = {'x', '1'}}, {name = 'INCR', args = {'n' .. c.db}}}",
            "SET a 1",
            "SET x 1; INCR n3",
        ),
        ("return #c.keys == 0 and #c.args == 2", "JSON.FORGET a b", "keep"),
        ("return c.nothing == nil", "SET a 1", "keep"),
        (
            "return {{name = 'DEL', args = {'a'}}, 5}",
            "SET a 1",
            "filter.lua: item 2 of what command returned is a integer",
        ),
        ("return {}", "SET a 1", "filter.lua: a command that was returned has no args"),
        (
            "return 5",
            "SET a 1",
            "filter.lua: command returned a integer; allowed: nothing, true, false, a command or a list of commands",
        ),
        (
            "return {name = 'SELECT', args = {'1'}}",
            "SET a 1",
            "filter.lua: command returned a command \"SELECT\", which it may not",
        ),
        (
            "return {db = 4, args = {'a', '1'}}",
            "SET a 1",
            "filter.lua: command cannot bring a command to another database; spec.databaseMap can",
        ),
        (
            "return {args = {{}}}",
            "SET a 1",
            "filter.lua: argument 1 of a command that was returned is a table; allowed: strings and numbers",
        ),
        ("\nerror('no such thing')", "SET a 1", "filter.lua:2: no such thing"),
        (
            "\n\nreturn c.args[9] .. 'x'",
            "SET a 1",
            "filter.lua:3: attempt to concatenate a nil value (field 'integer index')",
        ),
    ] {
        assert_eq!(commanded(&format!("function command(c) {body} end"), command), expected, "{body}");
    }
    let long = format!("DEL {}", (0..5000).map(|i| format!("k{i}")).collect::<Vec<_>>().join(" "));
    assert_eq!(
        commanded("function command(c) return #c.args == 5000 and #c.keys == 5000 end", &long),
        "keep"
    );
}

fn keyed(body: &str) -> Result<KeyChange, String> {
    let facts = KeyFacts { db: 1, key: b"a\xff", type_name: "hash", expire_at_ms: Some(7) };
    runner(&format!("function key(k) {body} end")).key(facts)
}

#[test]
fn keys_are_kept_dropped_and_changed() {
    assert_eq!(keyed(""), Ok(KeyChange::Keep));
    assert_eq!(keyed("return k"), Ok(KeyChange::Keep), "as it came");
    assert_eq!(
        keyed("return k.db == 1 and k.type == 'hash' and k.expireAt == 7 and #k.key == 2"),
        Ok(KeyChange::Keep)
    );
    assert_eq!(keyed("return k.type ~= 'hash'"), Ok(KeyChange::Drop));
    let change = |key: Option<&[u8]>, expire_at_ms, rewrite| {
        Ok(KeyChange::Change { key: key.map(<[u8]>::to_vec), expire_at_ms, rewrite })
    };
    assert_eq!(keyed("k.key = 'n:' .. k.key return k"), change(Some(b"n:a\xff"), None, false));
    assert_eq!(keyed("return {expireAt = false}"), change(None, Some(None), false));
    assert_eq!(
        keyed("return {expireAt = k.expireAt + 1, rewrite = true}"),
        change(None, Some(Some(8)), true)
    );
    for wrong in ["return {Key = 'x'}", "return {key = 5}", "return {db = 2}", "return {'x'}", "return 'x'"] {
        let why = keyed(wrong).unwrap_err();
        assert!(why.starts_with("filter.lua"), "{wrong}: {why}");
    }
}

/// What would reach outside, outlive a limit, or differ from run to run is not there.
#[test]
fn the_sandbox_holds() {
    let names = "io os debug package require load loadfile loadstring dofile pcall xpcall coroutine \
                 collectgarbage print warn string.dump math.random math.randomseed";
    for name in names.split_ascii_whitespace() {
        assert_eq!(
            commanded(&format!("function command(c) return {name} == nil end"), "INCR a"),
            "keep",
            "{name}"
        );
    }
    assert_eq!(commanded("function command(c) return ('').dump == nil end", "INCR a"), "keep");
    // Nor does it run behind a call, where no limit holds.
    let text = "error = function() end
        setmetatable({}, {__gc = function() while true do end end})
        function command(c) return c end";
    assert!(Script::new(text, false).unwrap_err().to_string().contains("__gc is not allowed"));
    let text = "local t = setmetatable({}, {__index = function() return true end})
        function command(c) return t.any end";
    assert_eq!(commanded(text, "INCR a"), "keep");
    let bytecode = "\u{1b}Lua";
    assert!(matches!(Script::new(bytecode, false), Err(ScriptError::Lua(_))));
}

#[test]
fn limits_end_a_call_and_the_next_one_goes_on() {
    let text = "function command(c)
        if c.name == 'INCR' then while true do end end
        if c.name == 'DECR' then local t = {} while true do t[#t + 1] = ('x'):rep(1000000) .. #t end end
        if c.name == 'GETSET' then return ('x'):rep(1 << 40) end
    end";
    let mut runner = runner(text);
    let mut ask = |command: &str| {
        let args = TestArgs::new(command);
        let args = args.args();
        runner.command(lookup(args.name()), &args, 0, &mut Vec::new())
    };
    for _ in 0..2 {
        let why = ask("INCR a").unwrap_err();
        assert_eq!(why, "filter.lua:2: more than 1000000 instructions in one call");
        assert!(ask("DECR a").unwrap_err().contains("memory"));
        assert!(ask("GETSET a b").is_err());
        assert_eq!(ask("SET a 1"), Ok(CommandChange::Keep));
    }
}

#[test]
fn faults_of_a_script_are_told() {
    let wrong = |text: &str, follows: bool| Script::new(text, follows).unwrap_err().to_string();
    assert!(wrong("function key(k)\n  return tru e\nend", true).starts_with("filter.lua:2: "));
    assert!(wrong("x = nothing.y", true).starts_with("filter.lua:1: "));
    assert!(wrong("while true do end", true).contains("instructions"));
    assert!(wrong("", true).contains("neither"));
    assert!(wrong("key = 5", true).contains("function"), "{}", wrong("key = 5", true));
    assert!(wrong("function key(k) end", true).contains("no command(c)"));
    assert!(Script::new("function key(k) end", false).is_ok());
    assert!(wrong(&" ".repeat((1 << 20) + 1), true).contains("at most"));
}
