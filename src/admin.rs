//! The operator's HTTP address: `/metrics`, `/health`, `/ready`, `/stats`.
//!
//! Invariant: it reads, and nothing else; a request can neither change the node nor reach a
//! shard's thread more than [`COLLECT_INTERVAL`] allows, however often it is asked. It lives on
//! a thread of its own. Only GET and HEAD; a `Host` that is not this server's is refused (a web
//! page that re-binds its name to this address), so is a foreign `Origin`. Neither keys nor
//! values are ever shown. `RELIABILITY` 9.7, decision 9.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_channel::{mpsc, oneshot};
use futures_util::StreamExt;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use tokio::time::{Instant, timeout};

use crate::metrics::{NodeSnapshot, Process, ShardSnapshot};

/// Shards are asked at most this often; answers in between repeat the last.
pub const COLLECT_INTERVAL: Duration = Duration::from_millis(100);
/// How long shards may take to answer; one that takes longer makes the node unhealthy.
pub const COLLECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Within this time a request's head must be complete.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// After this time a connection is closed, whatever it is doing.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// Most bytes of a request's head.
const HEAD_SIZE_MAX: usize = 16 << 10;
/// Most connections at once; further ones are closed.
const CONNECTIONS_MAX: usize = 64;

/// Where the answers come from; the server implements it over its shards' inboxes.
pub trait Source: Send + Sync + 'static {
    /// How many shards will answer [`Source::ask`].
    fn shard_count(&self) -> usize;
    /// Asks each shard to send its snapshot. Returns at once.
    fn ask(&self, reply: mpsc::UnboundedSender<ShardSnapshot>);
    /// What is known without asking a shard. Returns at once; `shards` stays empty.
    fn describe(&self) -> NodeSnapshot;
    /// Whether clients are served now, and if not, why: "starting", "draining".
    ///
    /// # Errors
    /// The reason.
    fn ready(&self) -> Result<(), String>;
}

/// The running thread.
#[derive(Debug)]
pub struct Admin {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Admin {
    /// Listens and starts the thread. `names` are host names under which it may be asked, besides
    /// the address itself and, on loopback, `localhost`.
    ///
    /// # Errors
    /// What the system says to binding, or to starting a thread.
    pub fn start(
        address: SocketAddr,
        names: Vec<String>,
        source: Arc<dyn Source>,
    ) -> io::Result<Admin> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new().name("annulus-admin".into()).spawn(move || {
            let local = tokio::task::LocalSet::new();
            let hosts = Hosts { address, names };
            let serving = serve(listener, hosts, source, stopped);
            if let Err(error) = local.block_on(&runtime, serving) {
                tracing::error!(%error, "the admin address stopped");
            }
        })?;
        Ok(Admin { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens, with the port that was taken.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Admin {
    /// Stops the thread and waits for it.
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook; nothing is left to do.
            let _ = thread.join();
        }
    }
}

async fn serve(
    listener: TcpListener,
    hosts: Hosts,
    source: Arc<dyn Source>,
    mut stopped: oneshot::Receiver<()>,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let router = router(hosts, source);
    let open = Rc::new(());
    loop {
        let accepted =
            futures_util::future::select(Box::pin(listener.accept()), &mut stopped).await;
        let stream = match accepted {
            futures_util::future::Either::Right(_) => return Ok(()),
            futures_util::future::Either::Left((Ok((stream, _)), _)) => stream,
            futures_util::future::Either::Left((Err(error), _)) => {
                // Out of descriptors, most likely: wait for some to be closed.
                tracing::warn!(%error, "the admin address could not accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if Rc::strong_count(&open) > CONNECTIONS_MAX {
            continue;
        }
        let (held, router) = (open.clone(), router.clone());
        tokio::task::spawn_local(async move {
            let _held = held;
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(HEAD_SIZE_MAX)
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
            // Whatever went wrong is the other side's affair: it has been told, or is gone.
            let _ = timeout(CONNECTION_TIMEOUT, connection).await;
        });
    }
}

/// The names under which this server may be asked.
#[derive(Clone, Debug)]
struct Hosts {
    address: SocketAddr,
    names: Vec<String>,
}

impl Hosts {
    /// Whether a `Host` header, or the host part of an origin, means this server.
    fn allow(&self, host: &str) -> bool {
        let (name, port) = match host.rsplit_once(':') {
            Some((name, port)) if !port.ends_with(']') => (name, port.parse::<u16>().ok()),
            _ => (host, Some(self.address.port())),
        };
        if port.is_none() {
            return false;
        }
        let literal = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
        let listening = self.address.ip();
        match literal {
            Some(ip) if ip == listening => true,
            Some(ip) if listening.is_loopback() => ip.is_loopback(),
            // A name can be re-bound by a stranger's DNS; a literal address cannot.
            Some(_) => listening.is_unspecified(),
            None => {
                (name.eq_ignore_ascii_case("localhost")
                    && (listening.is_loopback() || listening.is_unspecified()))
                    || self.names.iter().any(|known| known.eq_ignore_ascii_case(name))
            }
        }
    }

    /// The refusal of a request's head, if it is to be refused.
    fn refuse(&self, method: &Method, headers: &HeaderMap) -> Option<(StatusCode, &'static str)> {
        let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or(""));
        if method != Method::GET && method != Method::HEAD {
            return Some((
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET: nothing here changes state\n",
            ));
        }
        if !text(header::HOST).is_some_and(|host| self.allow(host)) {
            return Some((StatusCode::FORBIDDEN, "the Host header names another server\n"));
        }
        if let Some(origin) = text(header::ORIGIN) {
            let host = origin.split_once("://").map_or("", |(_, host)| host);
            let same = text(header::HOST).is_some_and(|own| own.eq_ignore_ascii_case(host));
            if !same {
                return Some((StatusCode::FORBIDDEN, "foreign origins are refused\n"));
            }
        }
        None
    }
}

#[derive(Clone)]
struct Shared {
    hosts: Arc<Hosts>,
    source: Arc<dyn Source>,
    asks: mpsc::UnboundedSender<oneshot::Sender<Arc<Collected>>>,
}

/// What the shards answered, and whether all of them did.
struct Collected {
    node: NodeSnapshot,
    missing: usize,
}

fn router(hosts: Hosts, source: Arc<dyn Source>) -> Router {
    let (asks, queue) = mpsc::unbounded();
    tokio::task::spawn_local(collect(source.clone(), queue));
    let shared = Shared { hosts: Arc::new(hosts), source, asks };
    Router::new()
        .route("/metrics", get(metrics))
        .route("/stats", get(stats))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .fallback(|| async { (StatusCode::NOT_FOUND, "/metrics /health /ready /stats\n") })
        .layer(middleware::from_fn_with_state(shared.clone(), guard))
        .with_state(shared)
}

async fn guard(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let mut response = match shared.hosts.refuse(request.method(), request.headers()) {
        Some(refusal) => refusal.into_response(),
        None => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    response
}

/// Asks the shards for whoever wants to know, at most once an interval.
async fn collect(
    source: Arc<dyn Source>,
    mut queue: mpsc::UnboundedReceiver<oneshot::Sender<Arc<Collected>>>,
) {
    let last: RefCell<Option<(Instant, Arc<Collected>)>> = RefCell::new(None);
    while let Some(reply) = queue.next().await {
        let fresh = last
            .borrow()
            .as_ref()
            .filter(|(at, _)| at.elapsed() < COLLECT_INTERVAL)
            .map(|(_, collected)| collected.clone());
        let collected = match fresh {
            Some(collected) => collected,
            None => {
                let collected = Arc::new(collect_once(source.as_ref()).await);
                *last.borrow_mut() = Some((Instant::now(), collected.clone()));
                collected
            }
        };
        // Whoever asked may have gone; the answer serves the next one.
        let _ = reply.send(collected);
    }
}

async fn collect_once(source: &dyn Source) -> Collected {
    let (reply, answers) = mpsc::unbounded();
    source.ask(reply);
    let count = source.shard_count();
    let mut shards = Vec::with_capacity(count);
    let mut answers = answers.take(count);
    let gather = async {
        while let Some(snapshot) = answers.next().await {
            shards.push(snapshot);
        }
    };
    // A shard that does not answer in time is missing from the sum, and said to be.
    let _ = timeout(COLLECT_TIMEOUT, gather).await;
    shards.sort_by_key(|snapshot: &ShardSnapshot| snapshot.shard);
    let missing = count - shards.len();
    let node = NodeSnapshot { shards, process: Process::probe(), ..source.describe() };
    Collected { node, missing }
}

impl Shared {
    fn collected(&self) -> impl Future<Output = Result<Arc<Collected>, StatusCode>> + Send + use<> {
        let (reply, answer) = oneshot::channel();
        let asked = self.asks.unbounded_send(reply);
        async move {
            asked.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
            answer.await.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)
        }
    }
}

async fn metrics(State(shared): State<Shared>) -> Result<impl IntoResponse, StatusCode> {
    let collected = shared.collected().await?;
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((kind, collected.node.to_prometheus()))
}

async fn stats(State(shared): State<Shared>) -> Result<impl IntoResponse, StatusCode> {
    let collected = shared.collected().await?;
    let mut text = collected.node.to_json().to_string();
    text.push('\n');
    Ok(([(header::CONTENT_TYPE, "application/json")], text))
}

/// Alive: every shard answers, and none has lost its log.
async fn health(State(shared): State<Shared>) -> Result<Response, StatusCode> {
    let collected = shared.collected().await?;
    let poisoned: Vec<u32> = collected
        .node
        .shards
        .iter()
        .filter(|shard| shard.gauges.log_poisoned > 0)
        .map(|shard| shard.shard)
        .collect();
    let healthy = collected.missing == 0 && poisoned.is_empty();
    let document = json!({
        "healthy": healthy,
        "shards_silent": collected.missing,
        "shards_poisoned": poisoned,
        "disk_level": collected.node.disk_level,
    });
    let status = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok((status, [(header::CONTENT_TYPE, "application/json")], format!("{document}\n"))
        .into_response())
}

/// Ready: clients are served.
async fn ready(State(shared): State<Shared>) -> Response {
    match shared.source.ready() {
        Ok(()) => (StatusCode::OK, "ready\n").into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Default)]
    struct Fake {
        asked: AtomicU32,
        silent: bool,
        poisoned: u64,
        draining: bool,
    }

    impl Source for Fake {
        fn shard_count(&self) -> usize {
            2
        }

        fn ask(&self, reply: mpsc::UnboundedSender<ShardSnapshot>) {
            self.asked.fetch_add(1, Ordering::Relaxed);
            for shard in (0..2).rev().filter(|shard| !(self.silent && *shard == 1)) {
                let mut snapshot = ShardSnapshot { shard, ..ShardSnapshot::default() };
                snapshot.metrics.counters.gets = 7;
                snapshot.gauges.log_poisoned = self.poisoned;
                reply.unbounded_send(snapshot).unwrap();
            }
        }

        fn describe(&self) -> NodeSnapshot {
            NodeSnapshot { version: "1.2.3".into(), ..NodeSnapshot::default() }
        }

        fn ready(&self) -> Result<(), String> {
            if self.draining { Err("draining".into()) } else { Ok(()) }
        }
    }

    fn start(fake: Fake) -> (Admin, Arc<Fake>) {
        let fake = Arc::new(fake);
        let names = vec!["node-a".to_owned()];
        let admin = Admin::start("127.0.0.1:0".parse().unwrap(), names, fake.clone()).unwrap();
        (admin, fake)
    }

    fn send(admin: &Admin, head: &str) -> String {
        let mut stream = TcpStream::connect(admin.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // The server may close before it has read all of a head that is too long.
        let _ = stream.write_all(head.as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    fn get(admin: &Admin, path: &str) -> String {
        let host = admin.address();
        send(admin, &format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"))
    }

    #[test]
    fn each_page_answers() {
        let (admin, _) = start(Fake::default());
        let metrics = get(&admin, "/metrics");
        assert!(metrics.contains("200 OK") && metrics.contains("text/plain; version=0.0.4"));
        assert!(metrics.contains("annulus_gets_total{shard=\"1\"} 7"));
        let stats = get(&admin, "/stats");
        let document: serde_json::Value =
            serde_json::from_str(stats.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(document["counters"]["gets"], 14);
        assert_eq!(document["version"], "1.2.3");
        assert!(get(&admin, "/health").contains("\"healthy\":true"));
        assert!(get(&admin, "/ready").contains("200 OK"));
        assert!(get(&admin, "/").contains("404"));
    }

    #[test]
    fn a_silent_or_poisoned_shard_makes_the_node_unhealthy() {
        let (admin, _) = start(Fake { silent: true, ..Fake::default() });
        let answer = get(&admin, "/health");
        assert!(answer.contains("503") && answer.contains("\"shards_silent\":1"), "{answer}");
        let (admin, _) = start(Fake { poisoned: 1, draining: true, ..Fake::default() });
        let answer = get(&admin, "/health");
        assert!(answer.contains("503") && answer.contains("\"shards_poisoned\":[0,1]"));
        let answer = get(&admin, "/ready");
        assert!(answer.contains("503") && answer.contains("draining"));
    }

    #[test]
    fn shards_are_asked_once_an_interval_however_many_scrape() {
        let (admin, fake) = start(Fake::default());
        let begin = Instant::now();
        for _ in 0..50 {
            get(&admin, "/metrics");
        }
        let intervals = begin.elapsed().as_millis() / COLLECT_INTERVAL.as_millis() + 2;
        assert!(u128::from(fake.asked.load(Ordering::Relaxed)) <= intervals);
    }

    #[test]
    fn strangers_hosts_origins_and_methods_are_refused() {
        let (admin, _) = start(Fake::default());
        let own = admin.address();
        let ask = |method: &str, headers: &str| {
            let head = format!("{method} /stats HTTP/1.1\r\nConnection: close\r\n{headers}\r\n");
            send(&admin, &head).lines().next().unwrap_or("").to_owned()
        };
        assert!(ask("GET", &format!("Host: {own}\r\n")).contains("200"));
        assert!(ask("GET", "Host: localhost\r\n").contains("200"));
        assert!(ask("GET", "Host: NODE-A:80\r\n").contains("200"));
        assert!(ask("GET", &format!("Host: {own}\r\nOrigin: http://{own}\r\n")).contains("200"));
        for headers in
            ["", "Host: evil.example\r\n", "Host: 10.0.0.1\r\n", "Host: localhost.evil\r\n"]
        {
            assert!(ask("GET", headers).contains("403"), "{headers}");
        }
        for origin in ["http://evil.example", "null", "http://127.0.0.1:1", ""] {
            let headers = format!("Host: {own}\r\nOrigin: {origin}\r\n");
            assert!(ask("GET", &headers).contains("403"), "{origin}");
        }
        for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
            let headers = format!("Host: {own}\r\nContent-Length: 0\r\n");
            assert!(ask(method, &headers).contains("405"), "{method}");
        }
    }

    #[test]
    fn a_huge_head_is_refused_and_the_next_request_served() {
        let (admin, _) = start(Fake::default());
        let answer = get(&admin, &format!("/{}", "a".repeat(10 << 20)));
        assert!(!answer.contains("200 OK"));
        assert!(get(&admin, "/ready").contains("200 OK"));
    }

    #[test]
    fn dropping_it_frees_the_port() {
        let (admin, _) = start(Fake::default());
        let address = admin.address();
        drop(admin);
        TcpListener::bind(address).unwrap();
    }
}
