//! The server of the dashboard, over real connections: good requests, bad ones, and too many.

#![allow(clippy::unwrap_used, reason = "a panic fails the test")]

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustcluster_core::agent::startup;
use rustcluster_core::head::dashboard::server::Site;
use rustcluster_core::head::hub::Hub;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// A test waits at most this long.
const LIMIT: Duration = Duration::from_secs(20);

struct Served {
    hub: Hub,
    port: u16,
    token: String,
}

fn serve() -> Served {
    let mut hub = Hub::start(Vec::new(), startup::hello("0", "4.2.2", "test"), 1 << 20).unwrap();
    let site = Site::open("127.0.0.1", 0, &[]).unwrap();
    let (port, token) = (site.port().unwrap(), site.token().to_owned());
    hub.open_dashboard(site).unwrap();
    Served { hub, port, token }
}

impl Served {
    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// Sends bytes, and returns what comes back until the end of the connection.
    fn send(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        let _ = stream.write_all(bytes);
        answer(&mut stream)
    }

    fn get(&self, path: &str) -> String {
        self.send(request(path, "localhost").as_bytes())
    }

    fn works(&self) -> bool {
        let figures = self.get(&format!("/{}/figures", self.token));
        figures.starts_with("HTTP/1.1 200 OK\r\n") && figures.contains("\"stopped\":false")
    }
}

fn request(path: &str, host: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n")
}

fn answer(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    // A connection may be reset after its answer.
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

#[test]
fn the_page_is_served_under_its_token_only() {
    let served = serve();
    let page = served.get(&format!("/{}/", served.token));
    assert!(page.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/html"));
    let nonce = page.split_once("script-src 'nonce-").unwrap().1;
    let nonce = nonce.split_once('\'').unwrap().0;
    assert!(page.contains(&format!("<script nonce=\"{nonce}\">")) && !page.contains("{{nonce}}"));
    let again = served.get(&format!("/{}/", served.token));
    assert!(!again.contains(nonce));
    assert_eq!(body(&page).len(), body(&again).len());
    for path in [
        "/",
        "/figures",
        "/0123456789abcdef0123456789abcdef/",
        "/favicon.ico",
    ] {
        assert!(served.get(path).starts_with("HTTP/1.1 403 "), "{path}");
    }
    let path = format!("/{}", served.token);
    let redirected = served.get(&path);
    assert!(redirected.starts_with("HTTP/1.1 308 "));
    assert!(redirected.contains(&format!("Location: ./{}/\r\n", served.token)));
    let foreign = request(&format!("/{}/", served.token), "evil.example");
    assert!(served.send(foreign.as_bytes()).starts_with("HTTP/1.1 403 "));
    let head = format!("HEAD /{}/ HTTP/1.1\r\nHost: [::1]\r\n\r\n", served.token);
    let head = served.send(head.as_bytes());
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && body(&head).is_empty());
}

#[test]
fn bad_requests_are_answered_and_harm_nobody() {
    let served = serve();
    let long = format!(
        "GET /{}/ HTTP/1.1\r\nHost: localhost\r\nX: {}",
        served.token,
        "x".repeat(100_000)
    );
    assert!(served.send(long.as_bytes()).starts_with("HTTP/1.1 431 "));
    assert!(
        served
            .send(b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
            .starts_with("HTTP/1.1 400 ")
    );
    let post = format!(
        "POST /{}/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc",
        served.token
    );
    assert!(served.send(post.as_bytes()).starts_with("HTTP/1.1 405 "));
    let mut random = StdRng::seed_from_u64(1);
    let good = request(
        &format!("/{}/figures?wait=0&first=0&step=100&rank=1", served.token),
        "localhost",
    );
    for _ in 0..300 {
        let mut bytes = good.clone().into_bytes();
        for _ in 0..random.random_range(1..6) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..3) {
                0 => bytes[at] = random.random(),
                1 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, random.random()),
            }
        }
        let mut stream = served.connect();
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let answer = answer(&mut stream);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 "),
            "{answer}"
        );
    }
    for query in [
        "first=18446744073709551615&step=18446744073709551615",
        "first=0&step=0",
        "rank=0",
        "rank=4294967295",
        "wait=-1&seen=x&exports=",
        "first=1",
        "&&&=",
        "%00",
    ] {
        let answer = served.get(&format!("/{}/figures?{query}", served.token));
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{query}");
    }
    assert!(served.works());
}

#[test]
fn silent_connections_do_not_keep_a_page_out() {
    let served = serve();
    let mut slow: Vec<TcpStream> = (0..100).map(|_| served.connect()).collect();
    for stream in &mut slow {
        let _ = stream.write_all(b"GET /");
    }
    assert!(served.works());
    // The oldest have been closed, and the others are closed in time.
    for stream in &mut slow {
        let answer = answer(stream);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 408 "),
            "{answer}"
        );
    }
    assert!(served.works());
}

#[test]
fn too_many_requests_of_pages_are_refused() {
    let served = serve();
    let path = format!("/{}/figures?wait=30000", served.token);
    let mut held = Vec::new();
    for _ in 0..32 {
        // The request before is being held once a later one has been answered.
        assert!(served.works());
        let mut stream = served.connect();
        stream
            .write_all(request(&path, "localhost").as_bytes())
            .unwrap();
        held.push(stream);
    }
    let began = Instant::now();
    while served.works() {
        assert!(began.elapsed() < LIMIT);
    }
    drop(held);
    while !served.works() {
        assert!(began.elapsed() < LIMIT);
    }
}

#[test]
fn pages_that_wait_are_told_that_the_cluster_stops() {
    let mut served = serve();
    let path = format!("/{}/figures?wait=30000", served.token);
    let mut held: Vec<TcpStream> = (0..2).map(|_| served.connect()).collect();
    for stream in &mut held {
        stream
            .write_all(request(&path, "localhost").as_bytes())
            .unwrap();
    }
    // The requests are being held once a later one has been answered.
    assert!(served.works());
    served.hub.stop();
    for stream in &mut held {
        assert!(body(&answer(stream)).contains("\"stopped\":true"));
    }
    assert!(served.hub.is_closed(LIMIT));
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, served.port)).is_err());
    assert!(
        served
            .hub
            .open_dashboard(Site::open("127.0.0.1", 0, &[]).unwrap())
            .is_err()
    );
}

#[test]
fn a_dashboard_replaces_another_and_can_be_closed() {
    let mut served = serve();
    assert!(served.works());
    let site = Site::open("127.0.0.1", 0, &[]).unwrap();
    let (port, token) = (site.port().unwrap(), site.token().to_owned());
    served.hub.open_dashboard(site).unwrap();
    let old = (served.port, std::mem::replace(&mut served.token, token));
    served.port = port;
    assert!(served.works());
    assert_ne!(old.1, served.token);
    assert!(served.hub.is_watched());
    served.hub.close_dashboard().unwrap();
    assert!(!served.hub.is_watched());
    let began = Instant::now();
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() {
        assert!(began.elapsed() < LIMIT);
    }
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, old.0)).is_err());
}
