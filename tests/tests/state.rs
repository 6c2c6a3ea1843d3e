//! Where a channel stands as a whole

use std::time::Duration;

use callsign::ChannelState;
use callsign_tests::{
    bare::Bare,
    channel::{changing, over},
    peers::Peer,
    scripted::Scripted,
    wait,
};
use tokio::sync::watch;

const BOUND: Duration = Duration::from_secs(20);

async fn until(state: &mut watch::Receiver<ChannelState>, expected: ChannelState) {
    let reached = state.wait_for(|state| *state == expected);
    wait::within(&format!("the channel is {expected:?}"), BOUND, reached).await.expect("it says so");
}

#[tokio::test]
async fn a_channel_is_ready_while_any_endpoint_is_and_fails_when_all_do() {
    let (channel, _log, changes) = changing(|builder| builder);
    let mut state = channel.state();
    assert_eq!(*state.borrow(), ChannelState::Connecting, "it has just begun");
    let deaf = Peer::deaf();
    changes.insert(deaf.address());
    until(&mut state, ChannelState::TransientFailure).await;

    let one = Bare::well().await;
    changes.insert(one.address());
    until(&mut state, ChannelState::Ready).await;
    // A task that is aborted takes its listener and its connections with it.
    drop(one);
    until(&mut state, ChannelState::TransientFailure).await;

    let another = Bare::well().await;
    changes.insert(another.address());
    until(&mut state, ChannelState::Ready).await;
}

#[tokio::test]
async fn a_channel_whose_endpoints_were_all_removed_fails_until_there_is_one() {
    let (channel, _log, changes) = changing(|builder| builder);
    let mut state = channel.state();
    let server = Bare::well().await;
    changes.insert(server.address());
    until(&mut state, ChannelState::Ready).await;
    changes.remove(&server.address());
    until(&mut state, ChannelState::TransientFailure).await;
    changes.insert(server.address());
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
