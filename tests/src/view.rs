//! What a discovery has told so far

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use callsign::{Instance, discover::EtcdDiscover};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tower::discover::Change;

use crate::wait;

/// Follows a discovery and writes down what it tells; ends with its drop
#[derive(Debug)]
pub struct View {
    told: Arc<Mutex<Told>>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Told {
    shown: BTreeMap<String, Instance>,
    changes: usize,
    removed: usize,
}

impl View {
    /// Follows `discover`
    pub fn of(mut discover: EtcdDiscover) -> Self {
        let told = Arc::new(Mutex::new(Told::default()));
        let writer = Arc::clone(&told);
        let task = tokio::spawn(async move {
            while let Some(Ok(change)) = discover.next().await {
                lock(&writer).apply(&change);
            }
        });
        Self { told, task }
    }

    /// The addresses, sorted
    pub fn addresses(&self) -> Vec<String> {
        lock(&self.told).shown.keys().cloned().collect()
    }

    /// The instance that was told last for an address
    pub fn instance(&self, address: &str) -> Option<Instance> {
        lock(&self.told).shown.get(address).cloned()
    }

    /// How many changes were told, inserts of known addresses included
    pub fn changes(&self) -> usize {
        lock(&self.told).changes
    }

    /// How many addresses were taken away
    pub fn removed(&self) -> usize {
        lock(&self.told).removed
    }

    /// Waits until the addresses are these
    pub async fn until(&self, expected: &[&str], bound: Duration) {
        let what = format!("the view is {expected:?}");
        wait::until(&what, bound, || (self.addresses() == expected).then_some(())).await;
    }
}

impl Told {
    fn apply(&mut self, change: &Change<callsign::Address, Instance>) {
        self.changes += 1;
        match change {
            Change::Insert(address, instance) => {
                self.shown.insert(address.to_string(), instance.clone());
            }
            Change::Remove(address) => {
                self.removed += 1;
                self.shown.remove(&address.to_string());
            }
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}
