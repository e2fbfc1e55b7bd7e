//! Tests of the handshake: who does not hold the key is never authenticated.

use super::*;
use proptest::prelude::*;

fn key(byte: u8) -> Key {
    Key::new([byte; 32])
}

fn keys() -> Arc<[(u32, Key)]> {
    [(1, key(7)), (2, key(8))].into()
}

fn introduction() -> Introduction {
    Introduction::new([3; 16], "node17", "4711_2")
}

/// Both sides after a complete handshake.
fn connected(verdict: &Verdict) -> (Transport, Transport, Vec<Vec<u8>>) {
    let (mut dialer, first) = Dialer::start(&key(8), 2, &introduction()).unwrap();
    let mut listener = Listener::new(keys());
    let (mut second, mut third, mut fourth) = (Vec::new(), Vec::new(), Vec::new());
    assert_eq!(listener.feed(&first, &mut second), Ok(None));
    assert_eq!(dialer.feed(&second, &mut third), Ok(None));
    let dialled = listener.feed(&third, &mut Vec::new()).unwrap().unwrap();
    assert_eq!(
        (dialled.launcher, dialled.introduction),
        (2, introduction())
    );
    let head = listener.finish(verdict, &mut fourth).unwrap();
    let answer = dialer.feed(&fourth, &mut Vec::new()).unwrap();
    assert_eq!(answer.as_ref(), Some(verdict));
    let (agent, rest) = dialer.finish().unwrap();
    assert!(rest.is_empty());
    (agent, head, vec![first, second, third, fourth])
}

#[test]
fn holders_of_a_key_connect_and_exchange_bytes_both_ways() {
    for verdict in [
        Verdict::Accepted,
        Verdict::NotNeeded("no slot is free".into()),
        Verdict::Refused("too old".into()),
    ] {
        let (mut agent, mut head, _) = connected(&verdict);
        for content in [&b"x"[..], &[5; MAX_CONTENT]] {
            for (from, to) in [(0, 1), (1, 0)] {
                let sides = [&mut agent, &mut head];
                let (mut wire, mut out) = (Vec::new(), Vec::new());
                sides[from].seal(content, &mut wire).unwrap();
                assert_eq!(wire.len(), content.len() + LENGTH + TAG);
                assert!(wire.len() <= MAX_SEALED);
                // The content is not to be seen.
                assert!(wire.windows(20).all(|window| window != [5; 20]));
                assert_eq!(
                    sides[to].open(&wire, &mut out),
                    Ok(Opened::Content(wire.len()))
                );
                assert!(out == content);
            }
        }
        assert!(agent.seal(&[0; MAX_CONTENT + 1], &mut Vec::new()).is_err());
    }
}

#[test]
fn what_one_side_seals_the_other_opens_in_order() {
    let (mut agent, mut head, _) = connected(&Verdict::Accepted);
    let mut wire = Vec::new();
    for content in [&b"one"[..], b"two", b""] {
        agent.seal(content, &mut wire).unwrap();
    }
    let (mut out, mut at, mut opened) = (Vec::new(), 0, Vec::new());
    loop {
        match head.open(&wire[at..], &mut out).unwrap() {
            Opened::Incomplete => break,
            step @ (Opened::Content(taken) | Opened::End(taken)) => {
                at += taken;
                opened.push(matches!(step, Opened::End(_)));
            }
        }
    }
    assert_eq!((out.as_slice(), at), (&b"onetwo"[..], wire.len()));
    assert_eq!(opened, [false, false, true]);
    let mut back = Vec::new();
    head.seal(b"three", &mut back).unwrap();
    out.clear();
    assert_eq!(agent.open(&back, &mut out), Ok(Opened::Content(back.len())));
    assert_eq!(out, b"three");
}

#[test]
fn a_repeated_or_left_out_message_is_an_error() {
    for skip in [false, true] {
        let (mut agent, mut head, _) = connected(&Verdict::Accepted);
        let (mut one, mut two) = (Vec::new(), Vec::new());
        agent.seal(b"one", &mut one).unwrap();
        agent.seal(b"two", &mut two).unwrap();
        let mut out = Vec::new();
        if skip {
            assert!(head.open(&two, &mut out).is_err());
        } else {
            assert!(head.open(&one, &mut out).is_ok());
            assert!(head.open(&one, &mut out).is_err());
        }
    }
}

#[test]
fn a_wrong_key_and_an_unknown_launcher_fail() {
    for (key, launcher) in [(key(9), 2), (key(7), 2), (key(8), 1), (key(8), 3)] {
        let (_, first) = Dialer::start(&key, launcher, &introduction()).unwrap();
        let mut out = Vec::new();
        assert!(Listener::new(keys()).feed(&first, &mut out).is_err());
        assert!(out.is_empty());
    }
}

#[test]
fn a_replay_of_all_that_a_dialer_sent_is_not_authenticated() {
    let (_, _, wire) = connected(&Verdict::Accepted);
    let mut listener = Listener::new(keys());
    let mut out = Vec::new();
    assert_eq!(listener.feed(&wire[0], &mut out), Ok(None));
    assert!(!out.is_empty());
    assert!(listener.feed(&wire[2], &mut out).is_err());
    assert!(listener.finish(&Verdict::Accepted, &mut out).is_err());
}

#[test]
fn a_replay_of_all_that_a_head_sent_convinces_no_dialer() {
    let (_, _, wire) = connected(&Verdict::Accepted);
    let (mut dialer, _) = Dialer::start(&key(8), 2, &introduction()).unwrap();
    assert!(dialer.feed(&wire[1], &mut Vec::new()).is_err());
    assert!(dialer.feed(&wire[3], &mut Vec::new()).is_err());
    assert!(dialer.finish().is_err());
}

#[test]
fn another_protocol_is_a_reason() {
    let other = Introduction {
        protocol: PROTOCOL + 1,
        ..introduction()
    };
    assert!(other.problem().unwrap().contains("node17"));
    assert_eq!(introduction().problem(), None);
}

#[test]
fn too_many_bytes_are_an_error() {
    let mut listener = Listener::new(keys());
    let mut bytes = prologue(1);
    bytes.extend([255, 255]);
    assert_eq!(listener.feed(&bytes, &mut Vec::new()), Ok(None));
    let flood = [0; MAX_UNAUTHENTICATED];
    assert_eq!(listener.feed(&flood, &mut Vec::new()), Err(TOO_LONG));
}

proptest! {
    #[test]
    fn random_bytes_are_never_authentic(
        bytes in prop::collection::vec(any::<u8>(), 0..3000),
        opened in any::<bool>(),
        cut in 1usize..500,
    ) {
        let mut listener = Listener::new(keys());
        let (mut dialer, _) = Dialer::start(&key(8), 2, &introduction()).unwrap();
        let opening = if opened { prologue(2) } else { Vec::new() };
        for piece in [opening, bytes].concat().chunks(cut) {
            match listener.feed(piece, &mut Vec::new()) {
                Ok(dialled) => prop_assert_eq!(dialled, None),
                Err(_) => break,
            }
        }
        prop_assert!(listener.finish(&Verdict::Accepted, &mut Vec::new()).is_err());
        let _ = dialer.feed(&[0; 7], &mut Vec::new());
        prop_assert!(dialer.finish().is_err());
    }

    #[test]
    fn a_flipped_bit_is_never_authentic(bit in 0usize..8 * 150, message in 0usize..3) {
        let (mut dialer, mut first) = Dialer::start(&key(8), 2, &introduction()).unwrap();
        let mut listener = Listener::new(keys());
        let flip = |bytes: &mut Vec<u8>, which: usize| {
            if which == message {
                let bit = bit % (8 * bytes.len());
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
        };
        flip(&mut first, 0);
        let (mut second, mut third) = (Vec::new(), Vec::new());
        let mut authentic = false;
        if listener.feed(&first, &mut second).is_ok() {
            flip(&mut second, 1);
            if !second.is_empty() && dialer.feed(&second, &mut third).is_ok() && !third.is_empty() {
                flip(&mut third, 2);
                authentic = listener.feed(&third, &mut Vec::new()).is_ok_and(|who| who.is_some());
            }
        }
        prop_assert!(!authentic);
    }

    #[test]
    fn a_truncated_handshake_waits(cut in 0usize..100) {
        let (_, first) = Dialer::start(&key(8), 2, &introduction()).unwrap();
        let cut = cut.min(first.len() - 1);
        let mut listener = Listener::new(keys());
        let mut out = Vec::new();
        prop_assert_eq!(listener.feed(&first[..cut], &mut out), Ok(None));
        prop_assert!(out.is_empty());
        prop_assert_eq!(listener.feed(&first[cut..], &mut out), Ok(None));
        prop_assert!(!out.is_empty());
    }

    #[test]
    fn texts_survive(host in ".{0,400}", job in ".{0,400}", reason in ".{0,3000}") {
        let ours = Introduction::new([1; 16], &host, &job);
        prop_assert_eq!(Introduction::decode(&ours.encode()), Some(ours));
        let verdict = Verdict::decode(&Verdict::NotNeeded(reason.clone()).encode());
        let Some(Verdict::NotNeeded(text)) = verdict else { panic!("{verdict:?}") };
        prop_assert!(reason.starts_with(&text));
    }
}
