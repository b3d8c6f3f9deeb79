//! Writes, lost connections and refusals meanwhile.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

#[tokio::test]
async fn writes_on_their_way_settle() {
    let (source, mut near, target, _far) = equal_pair().await;
    let writes = [
        "SET string:1 changed",
        "DEL string:2",
        "SET new 1",
        "HSET big:hash f1 changed",
        "PEXPIRE int:1 500000000",
        "DEL list:1",
        "SADD list:1 a",
    ];
    for command in writes {
        run(&mut near, command).await;
    }
    let mut on_their_way = input(&source, &target);
    let address = target.connect().await;
    let late = Arc::new(tokio::sync::Mutex::new(Some(address)));
    on_their_way.settle = Arc::new(move || {
        let late = Arc::clone(&late);
        Box::pin(async move {
            if let Some(mut far) = late.lock().await.take() {
                for command in writes {
                    run(&mut far, command).await;
                }
            }
        })
    });
    let report = report(on_their_way).await;
    assert_eq!(found(&report), [""; 0]);
    assert_eq!((report.differences(), report.unsettled), (0, 0));
}

#[tokio::test]
async fn keys_that_never_rest_are_unsettled() {
    let (source, mut near, target, mut far) = equal_pair().await;
    for command in ["SET counter 5", "SET missing:counter 5", "SET missing 5"] {
        run(&mut near, command).await;
    }
    run(&mut far, "SET counter 4").await;
    let mut input = input(&source, &target);
    input.rounds = 2;
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let writer = Arc::new(tokio::sync::Mutex::new(near));
    input.settle = Arc::new(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        let writer = Arc::clone(&writer);
        Box::pin(async move {
            let mut near = writer.lock().await;
            run(&mut near, "INCR counter").await;
            run(&mut near, "INCR missing:counter").await;
        })
    });
    let report = report(input).await;
    // A key that no look finds on the target is missing, though its value changes all the time.
    assert_eq!(found(&report), ["Missing missing: string", "Missing missing:counter: string"]);
    assert_eq!((report.missing, report.unsettled), (2, 1));
    assert_eq!(report.unsettled_keys, ["counter"]);
    assert!(calls.load(Ordering::Relaxed) >= 4);
}

#[tokio::test]
async fn two_servers_that_refuse_alike_are_not_equal() {
    let hidden = ["--rename-command", "DUMP", "HIDDEN"];
    let (source, target) = (Server::start(&hidden), Server::start(&hidden));
    run(&mut source.connect().await, "SADD key a").await;
    run(&mut target.connect().await, "SADD key b").await;
    let (progress, _) = watch::channel(VerifyProgress::default());
    let (_run, stop) = watch::channel(false);
    let result = verify(input(&source, &target), progress, stop).await;
    let Err(VerifyError::Refused { command, .. }) = result else { panic!("{result:?}") };
    assert_eq!(command, "DUMP");
}

#[tokio::test]
async fn lost_connections_are_replaced() {
    let (source, mut near, target, mut far) = equal_pair().await;
    run(&mut far, "DEL string:5").await;
    run(&mut near, "SET string:6 changed").await;
    let mut input = input(&source, &target);
    let killers = Arc::new(tokio::sync::Mutex::new([near, far]));
    input.settle = Arc::new(move || {
        let killers = Arc::clone(&killers);
        Box::pin(async move {
            for killer in killers.lock().await.iter_mut() {
                run(killer, "CLIENT KILL TYPE normal SKIPME yes").await;
            }
        })
    });
    // Twice, as more would use up the attempts.
    let (progress, _) = watch::channel(VerifyProgress::default());
    let (_run, stop) = watch::channel(false);
    let once = Arc::clone(&input.settle);
    let killed = Arc::new(AtomicUsize::new(0));
    input.settle = Arc::new(move || {
        let first = killed.fetch_add(1, Ordering::Relaxed) < 2;
        if first { once() } else { Box::pin(async {}) }
    });
    let report = verify(input, progress, stop).await.unwrap();
    assert_eq!(found(&report), ["Different string:6: value", "Missing string:5: string"]);
}

#[tokio::test]
async fn stops_when_told() {
    let (source, mut near, target, _far) = equal_pair().await;
    run(&mut near, "SET new 1").await;
    let mut input = input(&source, &target);
    let (stopper, stop) = watch::channel(false);
    let stopper = Arc::new(stopper);
    input.settle = Arc::new(move || {
        stopper.send_replace(true);
        Box::pin(std::future::pending())
    });
    let (progress, _) = watch::channel(VerifyProgress::default());
    let result = tokio::time::timeout(Duration::from_secs(20), verify(input, progress, stop)).await;
    assert!(matches!(result.unwrap(), Err(VerifyError::Stopped)));
}
