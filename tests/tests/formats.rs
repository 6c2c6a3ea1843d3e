//! Both layouts in etcd: what is written is what others read, what others write is read

#![cfg(unix)]

use std::time::Duration;

use callsign::{
    Etcd, EtcdOptions, Layout, Metadata, Registration, RegistrationState, Serve, ServeError,
    discover::EtcdDiscover,
    etcd::registration::{LossCause, RegisterError, RegistrationBuilder},
};
use callsign_tests::{
    etcd::EtcdProcess,
    proxy::Proxy,
    registry,
    service::{Calls, Hello, router},
    view::View,
    wait,
};
use tokio::sync::oneshot;
use tonic::transport::Server;

const SERVICE: &str = "hello.rpc";
/// How soon a change is seen
const SEEN: Duration = Duration::from_secs(2);
const BOUND: Duration = Duration::from_secs(20);

const A: &str = "10.0.0.1:80";
const B: &str = "10.0.0.2:80";
const C: &str = "10.0.0.3:80";
const D: &str = "[2001:db8::1]:80";

/// What stands in no layout of ours; the first two are as Kratos and Kitex write
const GARBAGE: [(&str, &str); 9] = [
    (
        "kratos",
        r#"{"id":"1","name":"hello","version":"v1","metadata":{},"endpoints":["grpc://10.9.0.1:80"]}"#,
    ),
    ("kitex", r#"{"network":"tcp","address":"10.9.0.2:80","weight":10,"tags":{"a":"b"}}"#),
    ("deleted", r#"{"Op":1,"Addr":"10.9.0.3:80","Metadata":null}"#),
    ("empty", r#"{"Op":0,"Addr":"","Metadata":"x"}"#),
    ("no-port", r#"{"Op":0,"Addr":"10.9.0.4","Metadata":null}"#),
    ("cut", r#"{"Op":0,"Addr":"10.9.0.5:80","Metad"#),
    ("trailing", r#"{"Op":0,"Addr":"10.9.0.6:80"}{"#),
    ("wrong", r#"{"Op":"0","Addr":"10.9.0.7:80"}"#),
    ("rpcx", "weight=5&calls=0.00&connections=1.00"),
];

fn session(endpoint: String) -> Etcd {
    Etcd::connect_lazy(EtcdOptions::new([endpoint])).expect("a valid host")
}

fn view(etcd: &EtcdProcess) -> View {
    View::of(EtcdDiscover::new(&session(etcd.endpoint()), SERVICE).expect("a valid name"))
}

fn grpc(etcd: &Etcd, address: &str) -> RegistrationBuilder {
    Registration::builder(etcd, SERVICE, address.parse().expect("an address")).layout(Layout::Grpc)
}

async fn put(etcd: &EtcdProcess, id: &str, value: &str) {
    etcd.put(&format!("{SERVICE}/{id}"), value).await;
}

/// Waits until the metadata at an address meets `condition`
async fn until_metadata(view: &View, address: &str, condition: impl Fn(&Metadata) -> bool) {
    let met = || view.instance(address).is_some_and(|instance| condition(&instance.metadata)).then_some(());
    wait::until(&format!("the metadata at {address} is another"), SEEN, met).await;
}

#[tokio::test]
async fn a_mixed_fleet_gives_each_endpoint_with_what_it_says_about_itself() {
    let etcd = registry::etcd().await;
    let session = session(etcd.endpoint());
    let ours = grpc(&session, B).weight(5).zone("eu-1").version("v2").metadata("team", "greetings");
    let _ours = ours.register().await.unwrap();
    put(&etcd, "7587862094067205428", A).await;
    put(&etcd, C, r#"{"Op":0,"Addr":"10.0.0.3:80","Metadata":null}"#).await;
    put(
        &etcd,
        "other",
        r#"{"addr":"[2001:db8::1]:80","metadata":{"weight":"3","n":7,"x":{"y":[]}},"more":1}"#,
    )
    .await;
    for (id, value) in GARBAGE {
        put(&etcd, id, value).await;
    }
    let listed = view(&etcd);
    listed.until(&[A, B, C, D], SEEN).await;
    assert!(
        listed.instance(A).unwrap().metadata.is_empty() && listed.instance(C).unwrap().metadata.is_empty()
    );
    let expected = Metadata::new().with_weight(5).with_zone("eu-1").unwrap().with_version("v2").unwrap();
    let instance = listed.instance(B).unwrap();
    assert_eq!(instance.metadata, expected.with("team", "greetings").unwrap());
    assert_eq!(&*instance.id, B, "in this layout the address is the id");
    assert_eq!(listed.instance(D).unwrap().metadata, Metadata::new().with_weight(3).with("n", "7").unwrap());

    // The same by the watch, and from one layout to the other.
    put(&etcd, C, r#"{"Op":0,"Addr":"10.0.0.3:80","Metadata":{"zone":"us-1"}}"#).await;
    until_metadata(&listed, C, |metadata| metadata.zone() == Some("us-1")).await;
    put(&etcd, "other", D).await;
    until_metadata(&listed, D, Metadata::is_empty).await;
    for (id, value) in GARBAGE {
        put(&etcd, id, &format!(" {value}")).await;
    }
    put(&etcd, "7587862094067205428", GARBAGE[0].1).await;
    listed.until(&[B, C, D], SEEN).await;
    assert_eq!(
        listed.removed(),
        1,
        "garbage in the place of an instance takes it away, and nothing else does"
    );
}

/// The expected bytes are what Go's `json.Marshal` printed for the structure of `go.etcd.io/etcd/client/v3/naming`.
#[tokio::test]
async fn the_grpc_layout_is_what_etcds_naming_writes() {
    let etcd = registry::etcd().await;
    let session = session(etcd.endpoint());
    let bare = grpc(&session, A).register().await.unwrap();
    assert_eq!(bare.key(), "hello.rpc/10.0.0.1:80");
    let said = grpc(&session, D)
        .weight(2)
        .zone("a<b>&c")
        .version("v1")
        .metadata("Zone", "x")
        .metadata("q", "\"\\/é😀");
    let _said = said.register().await.unwrap();
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    assert_eq!(
        etcd.pairs("hello.rpc/").await,
        [
            pair("hello.rpc/10.0.0.1:80", r#"{"Op":0,"Addr":"10.0.0.1:80","Metadata":null}"#),
            pair(
                "hello.rpc/[2001:db8::1]:80",
                concat!(
                    r#"{"Op":0,"Addr":"[2001:db8::1]:80","Metadata":{"Zone":"x","q":"\"\\/é😀","#,
                    r#""version":"v1","weight":2,"zone":"a\u003cb\u003e\u0026c"}}"#
                )
            ),
        ]
    );
    bare.deregister().await.unwrap();
    assert_eq!(etcd.pairs("hello.rpc/").await.len(), 1);
}

#[tokio::test]
async fn a_server_that_restarts_before_its_lease_has_ended_takes_its_own_key_over() {
    let etcd = registry::etcd().await;
    let proxy = Proxy::to(etcd.endpoint()).await;
    let crashed = grpc(&session(proxy.endpoint()), A).version("v1").register().await.unwrap();
    let view = view(&etcd);
    until_seen(&view, "v1").await;
    // As good as dead: its lease lives on.
    proxy.cut().await;
    let session = session(etcd.endpoint());
    let restarted = grpc(&session, A).version("v2").register().await.unwrap();
    until_seen(&view, "v2").await;
    assert_eq!((view.addresses(), view.removed()), (vec![A.to_owned()], 0), "it never left");
    assert_eq!(etcd.pairs("hello.rpc/").await.len(), 1, "one key, not two until the TTL ends");
    proxy.heal();
    let mut state = crashed.state();
    let overwritten = RegistrationState::Lost { cause: LossCause::Overwritten };
    wait::within("the first one gives up", BOUND, state.wait_for(|state| *state == overwritten))
        .await
        .unwrap();
    assert!(etcd.pairs("hello.rpc/").await[0].1.contains("v2"));
    assert!(matches!(*restarted.state().borrow(), RegistrationState::Registered { .. }));
}

async fn until_seen(view: &View, version: &str) {
    until_metadata(view, A, |metadata| metadata.version() == Some(version)).await;
}

#[tokio::test]
async fn when_the_newest_at_an_address_leaves_what_the_older_one_says_is_told() {
    let etcd = registry::etcd().await;
    let value = |zone: &str| format!(r#"{{"Op":0,"Addr":"{A}","Metadata":{{"zone":"{zone}"}}}}"#);
    let in_zone = |zone: &'static str| move |metadata: &Metadata| metadata.zone() == Some(zone);
    put(&etcd, "1", &value("old")).await;
    let view = view(&etcd);
    until_metadata(&view, A, in_zone("old")).await;
    put(&etcd, "2", &value("new")).await;
    until_metadata(&view, A, in_zone("new")).await;
    etcd.delete("hello.rpc/2").await;
    until_metadata(&view, A, in_zone("old")).await;
    assert_eq!((view.changes(), view.removed()), (3, 0));
}

#[tokio::test]
async fn a_server_registers_in_the_grpc_layout_under_the_address_that_it_was_given() {
    let etcd = registry::etcd().await;
    let (stop, stopped) = oneshot::channel::<()>();
    let serve =
        Serve::new(SERVICE).listen("127.0.0.1:0").etcd(&session(etcd.endpoint())).layout(Layout::Grpc);
    let serve = serve.weight(3).zone("z").version("v").metadata("k", "1").notice(Duration::ZERO);
    let hello = router(Server::builder(), Hello::new("a", Duration::ZERO), &Calls::default());
    let serving = tokio::spawn(serve.shutdown(async { drop(stopped.await) }).run(hello));
    let view = view(&etcd);
    let address = wait::until("it is registered", BOUND, || view.addresses().pop()).await;
    let metadata = r#"{"k":"1","version":"v","weight":3,"zone":"z"}"#;
    let value = format!(r#"{{"Op":0,"Addr":"{address}","Metadata":{metadata}}}"#);
    assert_eq!(etcd.pairs("hello.rpc/").await, [(format!("hello.rpc/{address}"), value)]);
    drop(stop);
    serving.await.unwrap().unwrap();
    assert_eq!(etcd.pairs("hello.rpc/").await, []);
}

#[tokio::test]
async fn a_server_with_metadata_that_its_layout_cannot_hold_does_not_start() {
    let etcd = session("127.0.0.1:1".to_owned());
    let refused = async |serve: Serve| {
        let hello = router(Server::builder(), Hello::new("a", Duration::ZERO), &Calls::default());
        let serving = serve.listen("127.0.0.1:0").etcd(&etcd).run(hello);
        match wait::within("it does not start", SEEN, serving).await {
            Err(ServeError::Register(error)) => error,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(refused(Serve::new(SERVICE).zone("z")).await, RegisterError::NoMetadata));
    let with_id = Serve::new(SERVICE).layout(Layout::Grpc).id(7);
    assert!(matches!(refused(with_id).await, RegisterError::NoId { id: 7 }));
    let forged = Serve::new(SERVICE).layout(Layout::Grpc).metadata("k", "a\nb");
    assert!(matches!(refused(forged).await, RegisterError::Metadata(_)));
}
