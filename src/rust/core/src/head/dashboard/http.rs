//! Reads the head of an HTTP request, decides whether it may have an answer, and writes the head of the answer. Pure: no
//! I/O.
//!
//! The server needs one method, no bodies and one request for each connection. The parser is that of hyper (crate
//! `httparse`).

use std::fmt::Write;
use std::net::IpAddr;

/// Maximum number of bytes of the head of a request.
pub const MAX_HEAD: usize = 8 * 1024;
/// Maximum number of header lines of a request.
const MAX_HEADERS: usize = 64;

/// A status of an answer, other than 200.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The request is not one of HTTP.
    BadRequest,
    /// The token is wrong or missing, or the request was made for another host.
    Forbidden,
    /// There is nothing at this path.
    NotFound,
    /// Only GET and HEAD are allowed.
    MethodNotAllowed,
    /// The head of the request did not arrive in time.
    Timeout,
    /// The head of the request is too long.
    TooLarge,
    /// Too many requests are being answered.
    Busy,
}

impl Status {
    /// The number and the reason, as in the first line of the answer.
    pub fn line(self) -> &'static str {
        match self {
            Status::BadRequest => "400 Bad Request",
            Status::Forbidden => "403 Forbidden",
            Status::NotFound => "404 Not Found",
            Status::MethodNotAllowed => "405 Method Not Allowed",
            Status::Timeout => "408 Request Timeout",
            Status::TooLarge => "431 Request Header Fields Too Large",
            Status::Busy => "503 Service Unavailable",
        }
    }
}

/// Who may see the pages.
#[derive(Clone, Debug)]
pub struct Access {
    /// The first part of all paths.
    pub token: String,
    /// Names in the `Host` header under which the server may be addressed, in lower case, besides `localhost`.
    pub names: Vec<String>,
    /// Whether the server listens on a loopback address only.
    pub loopback: bool,
}

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// The page itself.
    Page,
    /// The page, by an address without the slash at its end.
    PageWithoutSlash,
    /// The figures. The text is the query.
    Figures(String),
}

/// A request that may have an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked for.
    pub route: Route,
    /// The request is HEAD: the answer has no body.
    pub head_only: bool,
}

/// Reads a request from the bytes that have arrived. `None`: its head is not complete.
///
/// # Errors
/// The status of the answer if the request is refused.
pub fn read(bytes: &[u8], access: &Access) -> Result<Option<Request>, Status> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(len)) if len > MAX_HEAD => return Err(Status::TooLarge),
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) if bytes.len() >= MAX_HEAD => return Err(Status::TooLarge),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Status::TooLarge),
        Err(_) => return Err(Status::BadRequest),
    }
    let mut hosts = parsed.headers.iter();
    let mut hosts = hosts
        .by_ref()
        .filter(|h| h.name.eq_ignore_ascii_case("host"));
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => std::str::from_utf8(host.value).ok(),
        (None, _) => None,
        (Some(_), Some(_)) => return Err(Status::BadRequest),
    };
    if !host.is_some_and(|host| access.allows(host)) {
        return Err(Status::Forbidden);
    }
    let target = parsed.path.unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let path = path.strip_prefix('/').ok_or(Status::BadRequest)?;
    let (token, rest) = match path.split_once('/') {
        Some((token, rest)) => (token, Some(rest)),
        None => (path, None),
    };
    if !is_same(token.as_bytes(), access.token.as_bytes()) {
        return Err(Status::Forbidden);
    }
    let head_only = match parsed.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Err(Status::MethodNotAllowed),
    };
    let has_body = |header: &httparse::Header<'_>| {
        let name = header.name;
        name.eq_ignore_ascii_case("transfer-encoding")
            || name.eq_ignore_ascii_case("content-length") && header.value.trim_ascii() != b"0"
    };
    if parsed.headers.iter().any(has_body) {
        return Err(Status::BadRequest);
    }
    let route = match rest {
        None => Route::PageWithoutSlash,
        Some("") => Route::Page,
        Some("figures") => Route::Figures(query.to_owned()),
        Some(_) => return Err(Status::NotFound),
    };
    Ok(Some(Request { route, head_only }))
}

/// Compares in a time that does not depend on where the two differ.
fn is_same(a: &[u8], b: &[u8]) -> bool {
    let differ = a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b));
    a.len() == b.len() && std::hint::black_box(differ) == 0
}

impl Access {
    /// Whether a request with this `Host` header may have been made for this server. A page of another site can make the
    /// browser send requests here, under a name whose address that site changes to ours (DNS rebinding). It cannot do
    /// that with an address.
    fn allows(&self, host: &str) -> bool {
        let Some(name) = host_name(host.trim()) else {
            return false;
        };
        if let Ok(address) = name.parse::<IpAddr>() {
            return !self.loopback || address.is_loopback() || self.knows(name);
        }
        let name = name.to_ascii_lowercase();
        name == "localhost" || self.knows(&name)
    }

    fn knows(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }
}

/// The name in a `Host` header, without the port and the brackets of an IPv6 address.
pub fn host_name(host: &str) -> Option<&str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (name, port) = rest.split_once(']')?;
            (
                name,
                port.strip_prefix(':').or(port.is_empty().then_some("0")),
            )
        }
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, Some("0")),
        },
    };
    port.filter(|port| port.parse::<u16>().is_ok())?;
    Some(name.strip_suffix('.').unwrap_or(name))
}

/// The head of an answer with this many bytes. `security`: the Content-Security-Policy.
pub fn answer_head(kind: &str, len: usize, security: &str) -> String {
    head(
        "200 OK",
        kind,
        len,
        &format!("Content-Security-Policy: {security}\r\n"),
    )
}

/// An answer without content. `location`: the address to which the request is redirected.
pub fn redirect(location: &str) -> String {
    head(
        "308 Permanent Redirect",
        "text/plain",
        0,
        &format!("Location: {location}\r\n"),
    )
}

/// The whole answer to a request that is refused.
pub fn refusal(status: Status, head_only: bool) -> String {
    let text = match status {
        Status::Forbidden => "403: the address is not complete, or is that of another dashboard; \
             clusterDashboard() returns the address\n"
            .to_owned(),
        other => format!("{}\n", other.line()),
    };
    let allow = match status {
        Status::MethodNotAllowed => "Allow: GET, HEAD\r\n",
        _ => "",
    };
    let mut answer = head(
        status.line(),
        "text/plain; charset=utf-8",
        text.len(),
        allow,
    );
    if !head_only {
        answer.push_str(&text);
    }
    answer
}

fn head(status: &str, kind: &str, len: usize, more: &str) -> String {
    let mut head = String::with_capacity(512);
    let _ = write!(
        head,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\n{more}\
         Cache-Control: no-store\r\nReferrer-Policy: no-referrer\r\nX-Content-Type-Options: nosniff\r\n\
         Cross-Origin-Resource-Policy: same-origin\r\nConnection: close\r\n\r\n"
    );
    head
}

/// The value of a parameter of a query, if it is a number.
pub fn parameter<T: std::str::FromStr>(query: &str, name: &str) -> Option<T> {
    let mut all = query.split('&').filter_map(|pair| pair.split_once('='));
    let (_, value) = all.find(|(known, _)| *known == name)?;
    value.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn access() -> Access {
        Access {
            token: "0123456789abcdef".into(),
            names: vec!["pi.example".into()],
            loopback: true,
        }
    }

    fn get(path: &str, host: &str) -> Result<Option<Request>, Status> {
        read(
            format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes(),
            &access(),
        )
    }

    fn routes(path: &str) -> Result<Route, Status> {
        get(path, "127.0.0.1:80").map(|request| request.unwrap().route)
    }

    #[test]
    fn the_paths_of_the_page_begin_with_the_token() {
        assert_eq!(routes("/0123456789abcdef/"), Ok(Route::Page));
        assert_eq!(routes("/0123456789abcdef"), Ok(Route::PageWithoutSlash));
        let figures = Route::Figures("wait=1&x".into());
        assert_eq!(routes("/0123456789abcdef/figures?wait=1&x"), Ok(figures));
        assert_eq!(routes("/0123456789abcdef/other"), Err(Status::NotFound));
        for path in [
            "/",
            "//",
            "/0123456789abcdeF/",
            "/0123456789abcde/",
            "/0123456789abcdef0/",
            "/%30123456789abcdef/",
        ] {
            assert_eq!(routes(path), Err(Status::Forbidden), "{path}");
        }
        for path in [
            "http://127.0.0.1/0123456789abcdef/",
            "*",
            "0123456789abcdef/",
        ] {
            assert_eq!(routes(path), Err(Status::BadRequest), "{path}");
        }
    }

    #[test]
    fn the_host_header_must_be_ours() {
        let refused = |host| get("/0123456789abcdef/", host) == Err(Status::Forbidden);
        for host in [
            "127.0.0.1",
            "127.0.0.1:8080",
            "LocalHost:1",
            "[::1]:5",
            "[::1]",
            "localhost.",
            "pi.example:80",
            "127.9.9.9",
        ] {
            assert!(!refused(host), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.1",
            "[::2]",
            "",
            "localhost:x",
            "localhost:99999",
            "[::1",
            "[::1]x",
            "127.0.0.1:80:80",
            "user@localhost",
        ] {
            assert!(refused(host), "{host}");
        }
        let without = b"GET /0123456789abcdef/ HTTP/1.1\r\n\r\n";
        assert_eq!(read(without, &access()), Err(Status::Forbidden));
        let twice =
            b"GET /0123456789abcdef/ HTTP/1.1\r\nHost: localhost\r\nhost: localhost\r\n\r\n";
        assert_eq!(read(twice, &access()), Err(Status::BadRequest));
        let open = Access {
            loopback: false,
            ..access()
        };
        assert!(
            open.allows("10.0.0.1:80") && open.allows("pi.example") && !open.allows("evil.example")
        );
    }

    #[test]
    fn other_methods_and_bodies_are_refused() {
        let ask = |method: &str, more: &str| {
            let text =
                format!("{method} /0123456789abcdef/ HTTP/1.1\r\nHost: localhost\r\n{more}\r\n");
            read(text.as_bytes(), &access())
        };
        assert!(ask("HEAD", "").unwrap().unwrap().head_only);
        for method in [
            "POST", "PUT", "DELETE", "OPTIONS", "get", "CONNECT", "TRACE",
        ] {
            assert_eq!(ask(method, ""), Err(Status::MethodNotAllowed), "{method}");
        }
        assert_eq!(ask("GET", "Content-Length: 5\r\n"), Err(Status::BadRequest));
        assert_eq!(
            ask("GET", "Transfer-Encoding: chunked\r\n"),
            Err(Status::BadRequest)
        );
        assert!(ask("GET", "Content-Length: 0\r\n").is_ok());
        // Nobody learns from the method whether a token is right.
        let wrong = b"POST /wrong/ HTTP/1.1\r\nHost: localhost\r\n\r\n";
        assert_eq!(read(wrong, &access()), Err(Status::Forbidden));
    }

    #[test]
    fn long_heads_are_refused_and_incomplete_ones_awaited() {
        let head = b"GET /0123456789abcdef/ HTTP/1.1\r\nHost: localhost\r\n\r\n";
        for len in 0..head.len() {
            assert_eq!(read(&head[..len], &access()), Ok(None), "{len}");
        }
        assert!(read(head, &access()).unwrap().is_some());
        let mut long = b"GET /0123456789abcdef/ HTTP/1.1\r\nHost: localhost\r\nX: ".to_vec();
        long.resize(MAX_HEAD - 1, b'x');
        assert_eq!(read(&long, &access()), Ok(None));
        long.push(b'x');
        assert_eq!(read(&long, &access()), Err(Status::TooLarge));
        let many = "X: y\r\n".repeat(MAX_HEADERS + 1);
        let many = format!("GET /0123456789abcdef/ HTTP/1.1\r\nHost: localhost\r\n{many}\r\n");
        assert_eq!(read(many.as_bytes(), &access()), Err(Status::TooLarge));
    }

    #[test]
    fn damaged_requests_are_bad_requests() {
        for bytes in [
            &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n",
            b"GET / HTTP/1.1\r\nHo st: localhost\r\n\r\n",
            b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n",
            b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ] {
            assert_eq!(read(bytes, &access()), Err(Status::BadRequest), "{bytes:?}");
        }
    }

    #[test]
    fn parameters_are_numbers() {
        assert_eq!(parameter::<u64>("wait=5&first=70", "first"), Some(70));
        assert_eq!(parameter::<u64>("wait=5&first=70", "irst"), None);
        assert_eq!(
            parameter::<u32>("wait=-1&rank=x&step=99999999999", "wait"),
            None
        );
        assert_eq!(parameter::<u32>("rank=x&step=99999999999", "step"), None);
        assert_eq!(parameter::<u32>("", "step"), None);
    }

    #[test]
    fn refusals_are_complete_answers() {
        let answer = refusal(Status::MethodNotAllowed, false);
        assert!(answer.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"));
        assert!(
            answer.contains("\r\nAllow: GET, HEAD\r\n")
                && answer.contains("\r\nConnection: close\r\n")
        );
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())));
        assert!(refusal(Status::Forbidden, true).ends_with("\r\n\r\n"));
    }

    proptest! {
        #[test]
        fn any_bytes_have_an_outcome(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = read(&bytes, &access());
        }

        #[test]
        fn no_change_of_a_request_comes_past_the_token(
            at in 0usize..60, byte in any::<u8>(), cut in 0usize..60,
        ) {
            let mut request = b"GET /0123456789abcdef/figures?wait=1 HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec();
            let changed = request[at] != byte;
            request[at] = byte;
            request.remove(cut);
            let answered = read(&request, &access());
            if let Ok(Some(_)) = answered {
                // Only the changes behind the token are left.
                let text = String::from_utf8_lossy(&request).into_owned();
                prop_assert!(text.contains("/0123456789abcdef"), "{changed} {text}");
            }
        }

        #[test]
        fn host_headers_are_never_a_panic(host in "\\PC{0,40}") {
            let _ = access().allows(&host);
        }
    }
}
