//! An RDB of a real server that arrives damaged: said with its place, tried again, never taken for good.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::compare::{Rules, wait_equal_with};
use e2e::dataset::Dataset;
use e2e::scenario::PATIENCE;
use e2e::tool::{Finished, condition};
use e2e::{Endpoint, Fault, FaultProxy, Manifest, Options, Server, Tool, Version, args, wait_until};

const VERSION: Version = Version::REDIS_7_0;
const MARKER: &[u8] = b"damage:me";

struct Setting {
    source: Server,
    target: Server,
    proxy: FaultProxy,
    manifest: Manifest,
}

/// A source of about 2 MB, in the framing asked for, seen through the proxy.
fn setting(diskless: &str, fault: Fault, times: u64) -> Result<Setting> {
    let source = Options::new(VERSION)
        .with("repl-diskless-sync", diskless)
        .with("repl-diskless-sync-delay", "0")
        .start()?;
    Dataset::default().rounds(1).databases(&[]).fill(&mut source.client()?)?;
    let noise: Vec<u8> = (0..4000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()).collect();
    for key in 0..50 {
        source.conn()?.run(args!["SET", format!("noise:{key}"), noise])?;
    }
    source.conn()?.run(args!["SET", MARKER, noise])?;
    let target = Server::start(VERSION)?;
    let proxy = FaultProxy::start(&source.address(), fault, times)?;
    let through = Endpoint { address: proxy.address(), ..source.endpoint() };
    let manifest = Manifest::between(&through, &target.endpoint())
        .set("/spec/failurePolicy/backoffLimit", 2)
        .set("/spec/verification/mode", "Off");
    Ok(Setting { source, target, proxy, manifest })
}

fn never_in_sync(finished: &Finished) -> Result<()> {
    for line in finished.stdout.lines().filter(|line| line.starts_with('{')) {
        let status: serde_json::Value = serde_json::from_str(line)?;
        ensure!(condition(&status["status"], "InSync").as_deref() != Some("True"), "{line}");
    }
    Ok(())
}

/// Faults that the bytes themselves show: in the head, in the middle, in the checksum at the end.
fn visible() -> Vec<Fault> {
    vec![
        Fault::Flip { at: 3, mask: 0x20 },
        Fault::Flip { at: 400_000, mask: 1 },
        Fault::Remove { at: 300_000, bytes: 1 },
        Fault::Remove { at: 100_000, bytes: 70_000 },
        Fault::Behind { marker: MARKER, bytes: vec![0xff] },
    ]
}

#[test]
fn damage_that_passes_costs_another_full_sync() -> Result<()> {
    for (fault, diskless) in visible().into_iter().zip(["yes", "no"].into_iter().cycle()) {
        let seen = format!("{fault:?}");
        let setting = setting(diskless, fault, 1).context(seen.clone())?;
        let run = Tool::until_in_sync(&setting.manifest)?.expect_exit(0, PATIENCE).context(seen.clone())?;
        ensure!(setting.proxy.damaged() == 1, "{seen}: did not reach the RDB");
        ensure!(run.stderr.contains("starting again with a full sync"), "{seen}: {}", run.stderr);
        let (source, target) = (setting.source.endpoint(), setting.target.endpoint());
        wait_equal_with(&source, &target, &Rules::default(), Duration::ZERO).context(seen)?;
    }
    Ok(())
}

#[test]
fn damage_that_stays_ends_the_run_and_says_where() -> Result<()> {
    for (fault, diskless) in visible().into_iter().zip(["no", "yes"].into_iter().cycle()) {
        let seen = format!("{fault:?}");
        let setting = setting(diskless, fault, u64::MAX)?;
        let run = Tool::until_in_sync(&setting.manifest)?.expect_exit(1, PATIENCE).context(seen.clone())?;
        never_in_sync(&run).context(seen.clone())?;
        ensure!(setting.proxy.damaged() == 3, "{seen}: {} attempts", setting.proxy.damaged());
        let message = run.status()?["message"].as_str().unwrap_or_default().to_owned();
        let placed = message.contains("byte ") || message.contains("checksum");
        ensure!(placed && !run.stderr.contains("panicked"), "{seen}: {message}");
    }
    Ok(())
}

/// Lengths that no value has: refused before memory is taken for them.
#[test]
fn an_impossible_length_takes_no_memory() -> Result<()> {
    let lengths: [&[u8]; 3] = [
        // 64 bits, 32 bits, and a compressed string that expands to 2^32 - 1 bytes.
        &[0x81, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        &[0x80, 0xff, 0xff, 0xff, 0xff],
        &[0xc3, 0x40, 0x50, 0x80, 0xff, 0xff, 0xff, 0xff],
    ];
    for length in lengths {
        let fault = Fault::Behind { marker: MARKER, bytes: length.to_vec() };
        let setting = setting("no", fault, u64::MAX)?;
        let manifest = setting.manifest.clone().set("/spec/failurePolicy/backoffLimit", 0);
        let tool = Tool::until_in_sync(&manifest)?;
        let memory = format!("/proc/{}/status", tool.pid());
        let mut most = 0u64;
        wait_until("end of the run", PATIENCE, || {
            let status = std::fs::read_to_string(&memory).unwrap_or_default();
            let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let peak = peak.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            most = most.max(peak.unwrap_or_default());
            // A process that has ended, but was not waited for, has no memory.
            Ok(peak.is_none().then_some(()))
        })?;
        let run = tool.expect_exit(1, PATIENCE)?;
        never_in_sync(&run)?;
        ensure!(setting.proxy.damaged() == 1 && most > 0 && most < 300 << 10, "{length:02x?}: {most} KiB");
        let message = run.status()?["message"].as_str().unwrap_or_default().to_owned();
        ensure!(message.contains("byte "), "{length:02x?}: {message}");
    }
    Ok(())
}

/// A connection that ends inside the RDB is a lost connection: connected again, copied again.
#[test]
fn a_truncated_snapshot_is_asked_for_again() -> Result<()> {
    for diskless in ["yes", "no"] {
        let setting = setting(diskless, Fault::Cut { at: 350_000 }, 2)?;
        let run = Tool::until_in_sync(&setting.manifest)?.expect_exit(0, PATIENCE)?;
        ensure!(setting.proxy.damaged() == 2, "{} times", setting.proxy.damaged());
        ensure!(run.stderr.contains("in the middle of the RDB"), "{}", run.stderr);
        let (source, target) = (setting.source.endpoint(), setting.target.endpoint());
        wait_equal_with(&source, &target, &Rules::default(), Duration::ZERO)?;
    }
    Ok(())
}

#[test]
fn a_snapshot_that_is_always_truncated_is_never_in_sync() -> Result<()> {
    let setting = setting("yes", Fault::Cut { at: 350_000 }, u64::MAX)?;
    let policy = serde_json::json!({"backoffLimit": 2, "progressDeadlineSeconds": 3});
    let tool = Tool::until_in_sync(&setting.manifest.clone().set("/spec/failurePolicy", policy))?;
    wait_until("four attempts", PATIENCE, || Ok((setting.proxy.damaged() >= 4).then_some(())))?;
    tool.wait_for("the reason", PATIENCE, |status| {
        status["shards"][0]["lastError"]
            .as_str()
            .is_some_and(|error| error.contains("in the middle of the RDB"))
    })?;
    let run = tool.expect_exit(1, PATIENCE)?;
    ensure!(run.stderr.contains("no progress for 3 s"), "{}", run.stderr);
    never_in_sync(&run)
}
