//! What a server says about its health, followed and, at its end, told

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use tokio::time::sleep;
use tokio_stream::{Stream, StreamExt, StreamMap, once};
use tonic::Request;
use tonic_health::{
    ServingStatus,
    pb::{
        HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus as Told,
        health_server::Health as _,
    },
    server::{HealthReporter, HealthService},
};

/// Nothing announces that a service is given a status for the first time, or again.
const LOOK: Duration = Duration::from_secs(1);

/// A health that flaps is no reason to make etcd, and every client, follow each turn.
const CALM: Duration = Duration::from_millis(100);

/// The reporter and the services that count; without a reporter everything is well
pub(super) struct Health {
    reporter: Option<HealthReporter>,
    services: Vec<Arc<str>>,
}

impl Health {
    pub(super) fn new(reporter: Option<HealthReporter>, services: &[String]) -> Self {
        // The empty name is the server as a whole.
        let services = [""].into_iter().chain(services.iter().map(String::as_str)).map(Arc::from);
        Self { reporter, services: services.collect() }
    }

    /// Whether the server serves as far as is known now
    pub(super) async fn is_serving(&self) -> bool {
        let Some(reporter) = &self.reporter else { return true };
        let service = HealthService::from_health_reporter(reporter.clone());
        for name in &self.services {
            let answer = service.check(request(name)).await;
            if answer.is_ok_and(|answer| !is_serving(answer.get_ref())) {
                return false;
            }
        }
        true
    }

    /// Tells `on_change` whether the server serves, first and whenever that changes
    pub(super) async fn follow(&self, mut on_change: impl FnMut(bool)) -> Infallible {
        let Some(reporter) = &self.reporter else { return std::future::pending().await };
        let mut statuses =
            Statuses::new(HealthService::from_health_reporter(reporter.clone()), &self.services);
        let mut last = None;
        loop {
            statuses.next().await;
            let serving = statuses.all_serving();
            if last.replace(serving) != Some(serving) {
                tracing::debug!(serving, "health changed");
                on_change(serving);
                sleep(CALM).await;
            }
        }
    }

    /// Says of the whole, and of each service that counts, that it does not serve
    pub(super) async fn stop_serving(&self) {
        let Some(reporter) = &self.reporter else { return };
        for name in &self.services {
            reporter.set_service_status(name, ServingStatus::NotServing).await;
        }
    }
}

/// The latest status of each service
struct Statuses<'a> {
    service: HealthService,
    names: &'a [Arc<str>],
    /// Whether it serves, by place in `names`; `None` without a status
    serving: Vec<Option<bool>>,
    streams: StreamMap<usize, Changes>,
}

/// What is said about one service; `None` is the last item
type Changes = Pin<Box<dyn Stream<Item = Option<bool>> + Send>>;

impl<'a> Statuses<'a> {
    fn new(service: HealthService, names: &'a [Arc<str>]) -> Self {
        Self { service, names, serving: vec![None; names.len()], streams: StreamMap::new() }
    }

    fn all_serving(&self) -> bool {
        !self.serving.contains(&Some(false))
    }

    /// Takes in what is said next, all of it at once, or after a second nothing
    async fn next(&mut self) {
        self.open().await;
        let mut look = pin!(sleep(LOOK));
        poll_fn(|cx| {
            let mut news = look.as_mut().poll(cx).is_ready();
            // Judged one by one, two changes could look well in between.
            while let Poll::Ready(Some((place, serving))) = Pin::new(&mut self.streams).poll_next(cx) {
                self.serving[place] = serving;
                news = true;
            }
            if news { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Listens to those services that have a status by now
    async fn open(&mut self) {
        for (place, name) in self.names.iter().enumerate() {
            if self.streams.contains_key(&place) {
                continue;
            }
            if let Ok(said) = self.service.watch(request(name)).await {
                let said = said.into_inner().map(|said| said.ok().map(|said| is_serving(&said)));
                self.streams.insert(place, Box::pin(said.chain(once(None))));
            }
        }
    }
}

fn request(service: &str) -> Request<HealthCheckRequest> {
    Request::new(HealthCheckRequest { service: service.to_owned() })
}

/// Unknown is not well
fn is_serving(said: &HealthCheckResponse) -> bool {
    said.status == Told::Serving as i32
}

#[cfg(test)]
mod tests {
    use tokio::{sync::mpsc, time::Instant};

    use super::*;

    /// Follows a reporter; what was told comes out of the channel
    fn follow(reporter: &HealthReporter, services: &[&str]) -> mpsc::UnboundedReceiver<bool> {
        let services: Vec<_> = services.iter().map(ToString::to_string).collect();
        let health = Health::new(Some(reporter.clone()), &services);
        let (sender, told) = mpsc::unbounded_channel();
        tokio::spawn(
            async move { health.follow(|serving| sender.send(serving).expect("a test listens")).await },
        );
        told
    }

    async fn set(reporter: &HealthReporter, service: &str, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        reporter.set_service_status(service, status).await;
    }

    #[tokio::test(start_paused = true)]
    async fn all_services_that_count_have_to_serve() {
        let reporter = HealthReporter::new();
        let mut told = follow(&reporter, &["pb.Greeter"]);
        assert_eq!(told.recv().await, Some(true));
        // It has no status before.
        set(&reporter, "pb.Greeter", false).await;
        assert_eq!(told.recv().await, Some(false));
        set(&reporter, "", false).await;
        set(&reporter, "pb.Greeter", true).await;
        set(&reporter, "of.no.Account", false).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(told.is_empty());
        set(&reporter, "", true).await;
        assert_eq!(told.recv().await, Some(true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_status_that_is_cleared_has_no_say_until_it_is_set_again() {
        let mut reporter = HealthReporter::new();
        let mut told = follow(&reporter, &[]);
        assert_eq!(told.recv().await, Some(true));
        set(&reporter, "", false).await;
        assert_eq!(told.recv().await, Some(false));
        reporter.clear_service_status("").await;
        assert_eq!(told.recv().await, Some(true));
        set(&reporter, "", false).await;
        assert_eq!(told.recv().await, Some(false));
    }

    #[tokio::test(start_paused = true)]
    async fn a_health_that_flaps_is_followed_calmly_and_its_last_word_counts() {
        let reporter = HealthReporter::new();
        let mut told = follow(&reporter, &[]);
        let start = Instant::now();
        for turn in 0..10_000 {
            set(&reporter, "", turn % 2 == 0).await;
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
        tokio::time::sleep(CALM).await;
        let changes = told.len() as u128;
        assert!(changes <= start.elapsed().as_millis() / CALM.as_millis() + 1, "{changes} changes");
        let mut last = None;
        while let Ok(serving) = told.try_recv() {
            last = Some(serving);
        }
        assert_eq!(last, Some(false));
    }

    #[tokio::test]
    async fn who_stops_serving_says_so_of_all_that_counts() {
        let reporter = HealthReporter::new();
        let health = Health::new(Some(reporter.clone()), &["pb.Greeter".to_owned()]);
        assert!(health.is_serving().await);
        health.stop_serving().await;
        let service = HealthService::from_health_reporter(reporter);
        for name in ["", "pb.Greeter"] {
            assert!(!is_serving(service.check(request(name)).await.unwrap().get_ref()), "{name}");
        }
    }
}
