//! One request until it is answered: sent, sent elsewhere when its node owes the answer, hedged
//! when it is a read that is late, tried again after a pause when that is safe.
//!
//! Invariants: what may have happened is sent again only if that is harmless; all of a request's
//! copies have its one deadline; beyond the first each is paid for from a budget. The first answer
//! wins; later ones are dropped as they come, their connections live on.

use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use annulus_engine::model::{Instant, OriginId, Token};
use futures_channel::oneshot;

use super::choice::Need;
use super::health::Kind;
use super::link::{Answer, Ended, Link, Outcome};
use super::nodes::Chosen;
use super::types::{Error, Result};
use super::{Client, Effect};
use crate::client_connection::Unsent;
use crate::wire::fields::Version;
use crate::wire::request::Outgoing;
use crate::wire::response::{decode_failure, decode_write};
use crate::wire::status::{Class, Status};

/// Most copies of a request under way.
const FLIGHTS_MAX: usize = 3;

/// A request, and what may be done to get it answered.
pub(super) struct Ask<'a> {
    pub(super) token: Option<Token>,
    pub(super) request: &'a Outgoing<'a>,
    pub(super) effect: Effect,
    pub(super) kind: Kind,
    pub(super) deadline: Instant,
}

/// A copy of a request that was sent. Holds on to its connection, which would end when it is
/// replaced by another one in its slot.
struct Flight {
    receiver: oneshot::Receiver<Outcome>,
    link: std::sync::Arc<Link>,
    node: OriginId,
    sent: Instant,
    /// When to look at it again.
    alarm: Instant,
    is_overdue: bool,
}

/// What became of a request so far.
#[derive(Default)]
pub(super) struct Tries {
    flights: Vec<Flight>,
    asked: Vec<OriginId>,
    /// When the first copy was sent, and when a hedge is due.
    began: Instant,
    hedge_at: Option<Instant>,
    rounds: u32,
    /// A copy of a write ended without an answer: it may be applied.
    unsure: bool,
    /// The condition was false at a node that is behind: the answer if no other node knows better.
    stale: Option<Answer>,
}

enum Event {
    Ended(Flight, std::result::Result<Outcome, oneshot::Canceled>),
    Alarm,
}

impl Tries {
    /// With the first copy sent.
    pub(super) async fn begin(client: &Client, ask: &Ask<'_>) -> Result<Tries> {
        let mut tries = Tries::default();
        client.start(ask, &mut tries).await?;
        Ok(tries)
    }

    fn add(&mut self, flight: Flight) {
        if !self.asked.contains(&flight.node) {
            self.asked.push(flight.node);
        }
        self.flights.push(flight);
    }

    fn next_alarm(&self) -> Option<Instant> {
        self.flights.iter().map(|flight| flight.alarm).chain(self.hedge_at).min()
    }

    /// Whether it can be sent again after an end that leaves it unsure.
    fn may_repeat(&self, effect: Effect) -> bool {
        match effect {
            Effect::None | Effect::Once => true,
            Effect::Versioned(_) | Effect::Again => false,
        }
    }

    /// The error to tell: one that says "not started" is no answer for the copies before.
    fn told(&self, error: Error) -> Error {
        match error {
            Error::MayBeApplied { .. } => error,
            _ if self.unsure => Error::may_be_applied(format!("an earlier try; then: {error}")),
            _ => error,
        }
    }
}

impl Client {
    /// Waits for the answer, trying again while that is safe, the budget lasts and there is time.
    pub(super) async fn settle(&self, ask: &Ask<'_>, mut tries: Tries) -> Result<Answer> {
        loop {
            let error = match self.round(ask, &mut tries).await {
                Ok(answer) => {
                    self.pool.retry().succeeded();
                    return Ok(answer);
                }
                Err(error) => error,
            };
            let Some(until) = self.next_round(ask, &tries, &error) else {
                return match tries.stale.take() {
                    Some(answer) if !tries.unsure => Ok(answer),
                    _ => Err(tries.told(error)),
                };
            };
            // A timer that is gone releases its waits: the client is being dropped.
            let _ = self.pool.timer.wait_until(until).await;
            tries.rounds += 1;
        }
    }

    /// When to try again after this error; `None` when not at all.
    fn next_round(&self, ask: &Ask<'_>, tries: &Tries, error: &Error) -> Option<Instant> {
        let at_least = match error {
            Error::NotStarted { retry_after, .. } => *retry_after,
            Error::MayBeApplied { .. } if !tries.may_repeat(ask.effect) => return None,
            Error::Unreachable { .. } | Error::MayBeApplied { .. } => Duration::ZERO,
            _ => return None,
        };
        // Three nodes that have not seen a version: perhaps there is none.
        if tries.stale.is_some() && tries.rounds >= 2 {
            return None;
        }
        let wait = self.pool.retry().next(tries.rounds, at_least)?;
        let until = self.pool.timer.clock.after(wait);
        (until < ask.deadline).then_some(until)
    }

    /// Sends the request, unless it is under way, and waits until a copy is answered or none is
    /// left.
    async fn round(&self, ask: &Ask<'_>, tries: &mut Tries) -> Result<Answer> {
        if tries.flights.is_empty() {
            self.start(ask, tries).await?;
        }
        loop {
            let (flight, outcome) = match self.event(tries).await {
                Event::Ended(flight, outcome) => (flight, outcome),
                Event::Alarm => {
                    self.ring(ask, tries);
                    continue;
                }
            };
            let error = match self.land(ask, tries, &flight, outcome) {
                Ok(answer) => {
                    if !self.is_behind(ask, &answer) {
                        self.leave(tries);
                        return Ok(answer);
                    }
                    self.pool.behind(flight.node);
                    tries.stale = Some(answer);
                    let what = "the node has not seen the version named";
                    Error::not_started(Status::STALE_UNAVAILABLE, what)
                }
                Err(error) => {
                    let is_unsure = matches!(error, Error::MayBeApplied { .. });
                    tries.unsure |= is_unsure && ask.effect != Effect::None;
                    error
                }
            };
            if tries.flights.is_empty() {
                return Err(error);
            }
        }
    }

    /// What the end of one copy says.
    fn land(
        &self,
        ask: &Ask<'_>,
        tries: &mut Tries,
        flight: &Flight,
        outcome: std::result::Result<Outcome, oneshot::Canceled>,
    ) -> Result<Answer> {
        let unsure = |what: &str| match ask.effect {
            Effect::None => Error::not_started(Status::UNAVAILABLE, what),
            Effect::Once | Effect::Versioned(_) | Effect::Again => Error::may_be_applied(what),
        };
        match outcome {
            Ok(Ok(answer)) if answer.status.class() == Class::Answered => {
                let is_first_round = ask.kind == Kind::Read && tries.rounds == 0;
                let took = self.pool.timer.clock.now().nanos_since(tries.began);
                let took = is_first_round.then_some(took);
                self.pool.answered(flight.node, ask.kind, flight.sent, took);
                Ok(answer)
            }
            Ok(Ok(answer)) => {
                if answer.status == Status::BUSY {
                    self.pool.busy();
                }
                Err(match decode_failure(answer.status, &answer.body) {
                    Ok(failure) => Error::of(&failure),
                    Err(malformed) => unsure(malformed.0),
                })
            }
            Ok(Err(Ended::TimedOut)) => Err(unsure("no answer before the deadline")),
            Ok(Err(Ended::Lost)) | Err(oneshot::Canceled) => {
                self.pool.lost(flight.node);
                Err(unsure("the connection was lost before the answer"))
            }
        }
    }

    /// Whether a node found a condition false because it has not seen the version named yet: a
    /// version never follows a greater one.
    fn is_behind(&self, ask: &Ask<'_>, answer: &Answer) -> bool {
        if answer.status != Status::CONDITION_FALSE {
            return false;
        }
        let (Effect::Versioned(named), Ok(facts)) = (ask.effect, decode_write(&answer.body)) else {
            return false;
        };
        let live = facts.version;
        self.pool.is_many() && live != Version::default() && live.timestamp < named.timestamp
    }

    /// The answer is there: copies that were overtaken cast doubt on their nodes.
    fn leave(&self, tries: &Tries) {
        for flight in &tries.flights {
            let _ = self.pool.overdue(flight.node, &flight.link, Kind::Long, flight.sent);
        }
    }

    /// Waits for the end of a copy, or for the time to look at them.
    async fn event(&self, tries: &mut Tries) -> Event {
        let next = if self.pool.is_many() { tries.next_alarm() } else { None };
        let mut alarm = next.map(|at| self.pool.timer.alarm(at));
        std::future::poll_fn(|context| {
            for at in 0..tries.flights.len() {
                if let Poll::Ready(outcome) =
                    Pin::new(&mut tries.flights[at].receiver).poll(context)
                {
                    return Poll::Ready(Event::Ended(tries.flights.swap_remove(at), outcome));
                }
            }
            match alarm.as_mut().map(|alarm| Pin::new(alarm).poll(context)) {
                Some(Poll::Ready(Ok(()))) => Poll::Ready(Event::Alarm),
                // The client is being dropped.
                Some(Poll::Ready(Err(oneshot::Canceled))) => {
                    alarm = None;
                    Poll::Pending
                }
                _ => Poll::Pending,
            }
        })
        .await
    }

    /// The time has come to look at the copies: hedges, or goes elsewhere.
    fn ring(&self, ask: &Ask<'_>, tries: &mut Tries) {
        let now = self.pool.timer.clock.now();
        if tries.hedge_at.is_some_and(|at| at <= now) {
            tries.hedge_at = None;
            self.send_another(ask, tries, || self.pool.take_hedge());
        }
        for flight in &mut tries.flights {
            if flight.alarm <= now {
                let overdue = self.pool.overdue(flight.node, &flight.link, ask.kind, flight.sent);
                flight.alarm = now.after_nanos(overdue.look_again);
                flight.is_overdue = overdue.elsewhere;
            }
        }
        if tries.flights.iter().all(|flight| flight.is_overdue) {
            self.send_another(ask, tries, || self.pool.retry().take());
        }
    }

    /// Sends one more copy, to a healthy node that has none, if that is harmless and paid for.
    fn send_another(&self, ask: &Ask<'_>, tries: &mut Tries, pay: impl FnOnce() -> bool) {
        // A node that is only slow, or stopped and woken, carries its copy out as well: a condition
        // that it judges by what it has is no protection.
        let harmless = ask.token.is_some() && tries.may_repeat(ask.effect);
        if !harmless || tries.flights.len() >= FLIGHTS_MAX {
            return;
        }
        let chosen = self.pool.choose(ask.token, ask.kind, &tries.asked, Need::Another);
        if let Some(chosen) = chosen
            && pay()
            && let Ok(flight) = self.send(ask, &chosen)
        {
            tries.add(flight);
        }
    }

    fn send(&self, ask: &Ask<'_>, chosen: &Chosen) -> std::result::Result<Flight, Unsent> {
        let sent = self.pool.timer.clock.now();
        let receiver = chosen.link.send(ask.deadline, chosen.route, ask.request, self.flush)?;
        Ok(Flight {
            receiver,
            link: std::sync::Arc::clone(&chosen.link),
            node: chosen.node,
            sent,
            alarm: sent.after_nanos(chosen.bound),
            is_overdue: false,
        })
    }

    /// Sends a request, waiting for a connection and for room. Nothing was sent on errors.
    async fn start(&self, ask: &Ask<'_>, tries: &mut Tries) -> Result<()> {
        loop {
            let choose = || self.pool.choose(ask.token, ask.kind, &tries.asked, Need::Best);
            let Some(chosen) = choose() else {
                self.introduce(ask.deadline).await?;
                if choose().is_none() {
                    return Err(Error::Unreachable { what: "the connection was lost".to_owned() });
                }
                continue;
            };
            match self.send(ask, &chosen) {
                Ok(flight) => {
                    if tries.asked.is_empty() {
                        tries.began = flight.sent;
                        let is_read = ask.kind == Kind::Read && ask.token.is_some();
                        let after = chosen.hedge_after.filter(|_| is_read);
                        tries.hedge_at = after.map(|after| flight.sent.after_nanos(after));
                    }
                    tries.add(flight);
                    return Ok(());
                }
                Err(Unsent::WindowFull) => self.wait_for_room(ask, &chosen).await?,
                Err(Unsent::TooBig { limit }) => {
                    return Err(Error::Refused {
                        status: Status::TOO_BIG,
                        detail: limit,
                        message: "request".to_owned(),
                    });
                }
                // The next choice leaves it out.
                Err(Unsent::Closing | Unsent::NotOpen) => {}
            }
        }
    }

    /// Waits until there may be room in the window of a connection, or the request should go
    /// elsewhere.
    async fn wait_for_room(&self, ask: &Ask<'_>, chosen: &Chosen) -> Result<()> {
        let clock = &self.pool.timer.clock;
        let mut room = chosen.link.wait_for_room(ask.deadline);
        loop {
            // Its place in the line is kept while the node is well.
            let until = match self.pool.is_many() {
                true => ask.deadline.min(clock.now().after_nanos(chosen.bound)),
                false => ask.deadline,
            };
            if self.within(until, &mut room).await.is_some() {
                return Ok(());
            }
            if clock.now() >= ask.deadline {
                let what = "the server took no more requests before the deadline";
                return Err(Error::not_started(Status::BUSY, what));
            }
            if !chosen.link.is_usable() || !self.pool.is_healthy(chosen.node) {
                return Ok(());
            }
        }
    }
}
