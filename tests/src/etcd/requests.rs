//! What the suites ask of an etcd and tell it, beside the sessions under test

use std::{sync::atomic::Ordering, thread, time::Duration};

use etcd_client::{Client, ConnectOptions, DeleteOptions, Error, GetOptions};
use tokio::{runtime::Builder, sync::oneshot};

use super::EtcdProcess;
use crate::wait;

/// A busy machine may take its time; one that takes this long hangs.
const ANSWERED: Duration = Duration::from_secs(20);

/// Who may do anything once [`EtcdProcess::enable_auth`] was called, and the password
const ROOT: &str = "root";

/// On a busy machine the members of a cluster elect more often than they should.
const ELECTION: &str = "leader";

/// Nor does a busy one answer in the seconds that etcd gives a request: what became of it is not said.
const TIMED_OUT: &str = "request timed out";

fn as_root() -> ConnectOptions {
    ConnectOptions::new().with_user(ROOT, ROOT)
}

impl EtcdProcess {
    /// Keys with this prefix and their values, in order of the keys
    pub async fn pairs(&self, prefix: &str) -> Vec<(String, String)> {
        let prefix = prefix.to_owned();
        self.ask_idempotent(async move |mut client| {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let got = client.get(prefix.as_str(), Some(GetOptions::new().with_prefix())).await?;
            Ok(got.kvs().iter().map(|pair| (text(pair.key()), text(pair.value()))).collect())
        })
        .await
    }

    /// Puts a value
    pub async fn put(&self, key: &str, value: impl Into<Vec<u8>>) {
        let (key, value) = (key.to_owned(), value.into());
        self.ask_idempotent(async move |mut client| {
            client.put(key.as_str(), value.clone(), None).await.map(drop)
        })
        .await;
    }

    /// Deletes a key
    pub async fn delete(&self, key: &str) {
        let key = key.to_owned();
        self.ask_idempotent(async move |mut client| client.delete(key.as_str(), None).await.map(drop)).await;
    }

    /// Deletes all keys with this prefix; how many there were
    pub async fn delete_all(&self, prefix: &str) -> i64 {
        let prefix = prefix.to_owned();
        self.ask_once(async move |mut client| {
            let all = DeleteOptions::new().with_prefix();
            Ok(client.delete(prefix.as_str(), Some(all)).await?.deleted())
        })
        .await
    }

    /// Leases that live
    pub async fn leases(&self) -> Vec<i64> {
        self.ask_idempotent(leases).await
    }

    /// The same once authentication is enabled
    pub async fn leases_as_root(&self) -> Vec<i64> {
        self.as_root(leases).await
    }

    /// Ends a lease, and its keys
    pub async fn revoke(&self, lease: i64) {
        self.ask_once(async move |mut client| client.lease_revoke(lease).await.map(drop)).await;
    }

    /// Its revision, which every put and every delete raises, and no lease
    pub async fn revision(&self) -> i64 {
        self.ask_idempotent(async |mut client| revision(&mut client).await).await
    }

    /// Forgets what was before now
    pub async fn compact(&self) {
        self.ask_once(async |mut client| {
            let now = revision(&mut client).await?;
            client.compact(now, None).await.map(drop)
        })
        .await;
    }

    /// Does as told as root, once authentication is enabled
    pub async fn as_root<T: Send + 'static>(
        &self,
        request: impl AsyncFn(Client) -> Result<T, Error> + Send + 'static,
    ) -> T {
        self.ask(Some(as_root()), &[ELECTION], request).await
    }

    /// From now on only root may do anything but ask for leases
    pub async fn enable_auth(&self) {
        self.ask_once(async |mut client| {
            client.user_add(ROOT, ROOT, None).await?;
            client.role_add(ROOT).await?;
            client.user_grant_role(ROOT, ROOT).await?;
            client.auth_enable().await.map(drop)
        })
        .await;
        self.guarded.store(true, Ordering::Relaxed);
    }

    /// For what may be done twice
    async fn ask_idempotent<T: Send + 'static>(
        &self,
        request: impl AsyncFn(Client) -> Result<T, Error> + Send + 'static,
    ) -> T {
        self.ask(None, &[ELECTION, TIMED_OUT], request).await
    }

    /// For what would fail, or be another thing, the second time
    async fn ask_once<T: Send + 'static>(
        &self,
        request: impl AsyncFn(Client) -> Result<T, Error> + Send + 'static,
    ) -> T {
        self.ask(None, &[ELECTION], request).await
    }

    /// Asks in a thread and a runtime of its own, again after an error that says one of `passing`
    ///
    /// So no task, descriptor or paused clock of a test has to do with it.
    async fn ask<T: Send + 'static>(
        &self,
        options: Option<ConnectOptions>,
        passing: &'static [&'static str],
        request: impl AsyncFn(Client) -> Result<T, Error> + Send + 'static,
    ) -> T {
        let endpoint = self.endpoint();
        let options = options.or_else(|| self.guarded.load(Ordering::Relaxed).then(as_root));
        let (sender, answer) = oneshot::channel();
        thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be built");
            let answered = runtime.block_on(wait::within("etcd answers", ANSWERED, async {
                let client = Client::connect([endpoint], options).await?;
                loop {
                    match request(client.clone()).await {
                        Err(error) if passing.iter().any(|text| error.to_string().contains(text)) => continue,
                        answer => return answer,
                    }
                }
            }));
            drop(runtime);
            // Who asked may be gone.
            let _ = sender.send(answered);
        });
        answer.await.expect("etcd answers in time").expect("etcd does as it is told")
    }
}

async fn revision(client: &mut Client) -> Result<i64, Error> {
    let asked = client.get("any key", None).await?;
    Ok(asked.header().expect("every answer has a header").revision())
}

async fn leases(mut client: Client) -> Result<Vec<i64>, Error> {
    Ok(client.leases().await?.leases().iter().map(|lease| lease.id()).collect())
}
