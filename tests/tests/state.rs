//! Where a channel stands as a whole

use std::{convert::Infallible, time::Duration};

use callsign::{Address, Channel, ChannelState, Instance};
use callsign_tests::{bare::Bare, channel::over, peers::Peer, scripted::Scripted, wait};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower::discover::Change;

const BOUND: Duration = Duration::from_secs(20);

async fn until(state: &mut watch::Receiver<ChannelState>, expected: ChannelState) {
    let reached = state.wait_for(|state| *state == expected);
    wait::within(&format!("the channel is {expected:?}"), BOUND, reached).await.expect("it says so");
}

type Changes = mpsc::UnboundedSender<Result<Change<Address, Instance>, Infallible>>;

fn changing() -> (Channel, Changes) {
    let (changes, discover) = mpsc::unbounded_channel();
    (Channel::builder(UnboundedReceiverStream::new(discover)).build().expect("valid"), changes)
}

fn insert(changes: &Changes, address: Address) {
    let inserted = changes.send(Ok(Change::Insert(address.clone(), address.into())));
    inserted.expect("the channel lives");
}

#[tokio::test]
async fn a_channel_is_ready_while_any_endpoint_is_and_fails_when_all_do() {
    let (channel, changes) = changing();
    let mut state = channel.state();
    assert_eq!(*state.borrow(), ChannelState::Connecting, "it has just begun");
    let deaf = Peer::deaf();
    insert(&changes, deaf.address());
    until(&mut state, ChannelState::TransientFailure).await;

    let one = Bare::well().await;
    insert(&changes, one.address());
    until(&mut state, ChannelState::Ready).await;
    // A task that is aborted takes its listener and its connections with it.
    drop(one);
    until(&mut state, ChannelState::TransientFailure).await;

    let another = Bare::well().await;
    insert(&changes, another.address());
    until(&mut state, ChannelState::Ready).await;
}

#[tokio::test]
async fn a_channel_whose_endpoints_were_all_removed_fails_until_there_is_one() {
    let (channel, changes) = changing();
    let mut state = channel.state();
    let server = Bare::well().await;
    insert(&changes, server.address());
    until(&mut state, ChannelState::Ready).await;
    changes.send(Ok(Change::Remove(server.address()))).unwrap();
    until(&mut state, ChannelState::TransientFailure).await;
    insert(&changes, server.address());
    until(&mut state, ChannelState::Ready).await;
}

#[tokio::test]
async fn an_endpoint_that_has_failed_is_no_promise_while_it_is_dialled_again() {
    // Accepted, closed, and dialled again and again.
    let closing = Scripted::start(|_, peer| async move { peer.close() }).await;
    let channel = over([closing.address()]);
    let mut state = channel.state();
    until(&mut state, ChannelState::TransientFailure).await;
    state.mark_unchanged();
    let mut updates = channel.updates();
    let dialled = async {
        use tokio_stream::StreamExt as _;
        let mut failures = 0;
        while failures < 2 {
            let update = updates.next().await.expect("the channel lives");
            failures += u32::from(update.state == callsign::EndpointState::Backoff);
        }
    };
    wait::within("it fails again", BOUND, dialled).await;
    assert!(!state.has_changed().unwrap(), "{:?}", *state.borrow());
}

#[tokio::test]
async fn a_state_ends_with_shutdown_when_the_last_handle_is_gone() {
    let server = Bare::well().await;
    let channel = over([server.address()]);
    let mut state = channel.state();
    until(&mut state, ChannelState::Ready).await;
    let other = channel.clone();
    drop(channel);
    assert_eq!(*state.borrow(), ChannelState::Ready, "there is another handle");
    drop(other);
    until(&mut state, ChannelState::Shutdown).await;
    wait::within("nothing comes after it", BOUND, state.changed()).await.unwrap_err();
}
