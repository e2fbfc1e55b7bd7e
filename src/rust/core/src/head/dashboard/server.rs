//! Serves the page and its figures.
//!
//! A connection belongs to a stranger until its request has shown the token. Until then it costs a descriptor, at most
//! [`http::MAX_HEAD`] bytes and [`HEAD_TIMEOUT`]. There are at most [`MAX_STRANGERS`] of them: a further one
//! replaces the oldest. A connection has one request, so that no limit is needed for idle ones.

use super::http::{self, Access, Request, Route, Status};
use super::json::Json;
use crate::head::hub::{FigureQuery, SharedCore};
use crate::platform::socket;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tracing::{debug, info};

/// Maximum number of connections that have not shown the token.
const MAX_STRANGERS: usize = 32;
/// Maximum number of requests that are being answered.
const MAX_REQUESTS: usize = 32;
/// How long the head of a request may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an answer may take to be sent.
const SEND_TIMEOUT: Duration = Duration::from_secs(20);
/// The pause after an accept that has failed, for example because no descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How long pages have to read that the cluster has been stopped.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// After a refusal, bytes of the request are read for this long: closing a connection with unread bytes would make the
/// system drop the answer.
const LINGER: Duration = Duration::from_millis(300);
/// The longest time that a page may have a request held.
const MAX_WAIT: Duration = Duration::from_secs(30);

const PAGE: &str = include_str!("page.html");
/// The place in the page of the number that allows its script and its style.
const NONCE: &str = "{{nonce}}";

/// Listens for pages.
#[derive(Debug)]
pub struct Site {
    listener: TcpListener,
    access: Access,
}

impl Site {
    /// Listens on an address or name of this machine; any free port for 0. `names`: further names in the `Host` header
    /// under which the page may be asked for.
    ///
    /// # Errors
    /// When the address is none of this machine's, the port is not free, or there are no random numbers.
    pub fn open(host: &str, port: u16, names: &[String]) -> io::Result<Site> {
        let name = host.trim_start_matches('[').trim_end_matches(']');
        let addresses: Vec<SocketAddr> = (name, port).to_socket_addrs()?.collect();
        let listener = TcpListener::bind(&addresses[..])?;
        listener.set_nonblocking(true)?;
        let loopback = listener.local_addr()?.ip().is_loopback();
        let names = names.iter().map(String::as_str).chain([name]);
        let access = Access {
            token: random_text()?,
            names: names.map(str::to_ascii_lowercase).collect(),
            loopback,
        };
        Ok(Site { listener, access })
    }

    /// The port.
    ///
    /// # Errors
    /// When the system does not report the port.
    pub fn port(&self) -> io::Result<u16> {
        Ok(self.listener.local_addr()?.port())
    }

    /// Whether only this machine can reach the address.
    pub fn is_loopback(&self) -> bool {
        self.access.loopback
    }

    /// The first part of all paths.
    pub fn token(&self) -> &str {
        &self.access.token
    }
}

/// Returns 128 random bits in hexadecimal.
fn random_text() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// An order to the server.
#[derive(Debug)]
pub enum Order {
    /// Serve this site, instead of another one.
    Open(Site),
    /// Allow another name in the `Host` header.
    Allow(String),
    /// Serve nothing.
    Close,
}

/// A site that is being served.
struct Served {
    listener: tokio::net::TcpListener,
    access: Rc<RefCell<Access>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        // A process that was forked from this session has the socket, too.
        socket::stop_listening(self.listener.as_raw_fd());
    }
}

/// The connections of strangers, and the number of requests that are being answered.
#[derive(Default)]
struct Limits {
    strangers: RefCell<VecDeque<(u64, AbortHandle)>>,
    requests: Cell<usize>,
}

/// Counts a request while it is being answered.
struct Answering<'a>(&'a Cell<usize>);

impl<'a> Answering<'a> {
    fn begin(requests: &'a Cell<usize>) -> Option<Answering<'a>> {
        let count = requests.get();
        (count < MAX_REQUESTS).then(|| {
            requests.set(count + 1);
            Answering(requests)
        })
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

/// Serves the site that R has opened last, until `over` is notified: the cluster has been stopped, and pages have been
/// told so as far as they read.
pub async fn serve(
    shared_core: Arc<SharedCore>,
    mut orders: UnboundedReceiver<Order>,
    over: Rc<Notify>,
) {
    let limits = Rc::new(Limits::default());
    let mut connections = JoinSet::new();
    let mut served: Option<Served> = None;
    let mut count = 0;
    loop {
        tokio::select! {
            Some(order) = orders.recv() => match order {
                Order::Open(site) => {
                    served = start(site);
                    limits.strangers.borrow_mut().clear();
                    connections.abort_all();
                }
                Order::Allow(name) => {
                    if let Some(served) = &served {
                        served.access.borrow_mut().names.push(name);
                    }
                }
                Order::Close => {
                    served = None;
                    connections.abort_all();
                }
            },
            (stream, access) = accept(served.as_ref()) => {
                count += 1;
                let number = count;
                let (shared_core, of_task) = (shared_core.clone(), limits.clone());
                let task = async move {
                    converse(stream, &shared_core, &access, &of_task, number).await;
                    of_task.known(number);
                };
                limits.stranger(number, connections.spawn_local(task));
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            () = over.notified() => break,
        }
    }
    drop(served);
    let finish = async { while connections.join_next().await.is_some() {} };
    let _ = timeout(LAST_WORDS, finish).await;
}

fn start(site: Site) -> Option<Served> {
    let listener = tokio::net::TcpListener::from_std(site.listener).ok()?;
    info!(address = ?listener.local_addr().ok(), "dashboard opened");
    Some(Served {
        listener,
        access: Rc::new(RefCell::new(site.access)),
    })
}

/// Accepts a connection. Waits for ever without a site.
async fn accept(served: Option<&Served>) -> (TcpStream, Rc<RefCell<Access>>) {
    let Some(served) = served else {
        return std::future::pending().await;
    };
    loop {
        match served.listener.accept().await {
            Ok((stream, _)) => return (stream, served.access.clone()),
            Err(error) => {
                debug!(%error, "connection to the dashboard not accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl Limits {
    /// A connection has come. The oldest stranger is closed if there are too many.
    fn stranger(&self, number: u64, task: AbortHandle) {
        let mut strangers = self.strangers.borrow_mut();
        if strangers.len() >= MAX_STRANGERS {
            if let Some((_, oldest)) = strangers.pop_front() {
                oldest.abort();
            }
        }
        strangers.push_back((number, task));
    }

    /// The connection has shown the token, or has ended.
    fn known(&self, number: u64) {
        self.strangers
            .borrow_mut()
            .retain(|(other, _)| *other != number);
    }
}

/// Serves a connection.
async fn converse(
    mut stream: TcpStream,
    shared_core: &SharedCore,
    access: &RefCell<Access>,
    limits: &Limits,
    number: u64,
) {
    let head = timeout(HEAD_TIMEOUT, read_head(&mut stream, access)).await;
    let request = match head.unwrap_or(Ok(Err(Status::Timeout))) {
        // The connection has ended.
        Err(_) => return,
        Ok(Err(status)) => return refuse(stream, status, false).await,
        Ok(Ok(request)) => request,
    };
    limits.known(number);
    let Some(_answering) = Answering::begin(&limits.requests) else {
        return refuse(stream, Status::Busy, request.head_only).await;
    };
    if let Route::Figures(query) = &request.route {
        if !request.head_only && !hold(&mut stream, shared_core, query).await {
            return;
        }
    }
    let mut answer = answer_to(&request, shared_core, access);
    if request.head_only {
        let head = answer.find("\r\n\r\n").map_or(answer.len(), |end| end + 4);
        answer.truncate(head);
    }
    let _ = send(&mut stream, &answer).await;
}

/// Reads the head of a request. Reads nothing behind it: a request has no body.
async fn read_head(
    stream: &mut TcpStream,
    access: &RefCell<Access>,
) -> io::Result<Result<Request, Status>> {
    let mut bytes = Vec::with_capacity(1024);
    loop {
        let mut part = [0; 1024];
        let read = stream.read(&mut part).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(part.get(..read).unwrap_or_default());
        let request = http::read(&bytes, &access.borrow());
        match request {
            Ok(None) => {}
            Ok(Some(request)) => return Ok(Ok(request)),
            Err(status) => return Ok(Err(status)),
        }
    }
}

async fn send(stream: &mut TcpStream, answer: &str) -> io::Result<()> {
    let sent = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    };
    timeout(SEND_TIMEOUT, sent).await?
}

async fn refuse(mut stream: TcpStream, status: Status, head_only: bool) {
    debug!(status = status.line(), "request to the dashboard refused");
    if send(&mut stream, &http::refusal(status, head_only))
        .await
        .is_err()
    {
        return;
    }
    let mut rest = [0; 1024];
    let drain = async {
        let mut read = 0;
        while read < 2 * http::MAX_HEAD {
            match stream.read(&mut rest).await {
                Ok(0) | Err(_) => return,
                Ok(count) => read += count,
            }
        }
    };
    let _ = timeout(LINGER, drain).await;
}

/// Holds a request for as long as the page asks for, or until there is news. Returns whether the page is still there: a
/// page that was closed must not keep one of the places.
async fn hold(stream: &mut TcpStream, shared_core: &SharedCore, query: &str) -> bool {
    let query = FigureQuery::parse(query);
    let wait = query.wait.min(MAX_WAIT);
    if wait.is_zero() {
        return true;
    }
    let mut more = [0];
    tokio::select! {
        () = shared_core.wait_for_news(&query, wait) => true,
        // Nothing follows a request but the end of the connection.
        _ = stream.read(&mut more) => false,
    }
}

fn answer_to(request: &Request, shared_core: &SharedCore, access: &RefCell<Access>) -> String {
    match &request.route {
        Route::Page => page(),
        Route::PageWithoutSlash => http::redirect(&format!("./{}/", access.borrow().token)),
        Route::Figures(query) => {
            let query = FigureQuery::parse(query);
            let mut json = Json::default();
            shared_core.figures(&query).write(&mut json);
            let body = json.finish();
            let mut answer =
                http::answer_head("application/json", body.len(), "default-src 'none'");
            answer.push_str(&body);
            answer
        }
    }
}

/// The page. Its script and its style run because they have the number of the Content-Security-Policy, and nothing else
/// does.
fn page() -> String {
    let Ok(nonce) = random_text() else {
        return http::refusal(Status::Busy, false);
    };
    let body = PAGE.replace(NONCE, &nonce);
    // Front ends show the page in a frame.
    let security = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; \
         frame-ancestors 'self' http://127.0.0.1:* http://localhost:* vscode-webview:"
    );
    let mut answer = http::answer_head("text/html; charset=utf-8", body.len(), &security);
    answer.push_str(&body);
    answer
}
