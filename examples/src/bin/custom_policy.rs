//! A policy of one's own: a canary takes one call in twenty, and every call that asks for it
//!
//!     cargo run -p callsign-examples --bin custom_policy -- --canary 127.0.0.1:9091
//!
//! (without a `protoc`: `cargo xtask run custom_policy --canary 127.0.0.1:9091`)
//!
//! Prints who answers; start two of `hello_server` first, one of them with `--listen 127.0.0.1:9091`. etcd is the cluster named by
//! `CALLSIGN_ETCD` (hosts, login, TLS: see the README), else 127.0.0.1:2379.

use std::{error::Error, time::Duration};

use callsign::{
    EtcdChannel,
    policy::{Candidate, P2cEwma, Pick, Policy},
};
use callsign_examples::pb::{HelloRequest, greeter_client::GreeterClient};
use lexopt::prelude::*;
use tonic::Request;

/// Leaves the other calls to a policy that callsign has
struct Canary {
    /// As `host:port`
    name: String,
    rule: P2cEwma,
}

/// Worked out once for a set of endpoints, off the callers' path
struct Plan {
    canary: Option<usize>,
    others: Vec<Candidate>,
    rule: <P2cEwma as Policy>::Plan,
}

impl Policy for Canary {
    type Plan = Plan;

    fn plan(&self, candidates: &[Candidate]) -> Plan {
        let canary = candidates.iter().position(|candidate| candidate.name() == self.name);
        let mut others = candidates.to_vec();
        if let Some(index) = canary {
            others.remove(index);
        }
        Plan { canary, rule: self.rule.plan(&others), others }
    }

    // On the path of every call: it neither waits nor allocates.
    fn pick(&self, plan: &Plan, candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        // `allows`: it has room for one more call, and neither the caller nor a retry excludes it.
        let canary = plan.canary.filter(|&index| call.allows(&candidates[index]));
        if canary.is_some() && (call.headers.get("x-canary").is_some() || call.random.u8(..20) == 0) {
            return canary;
        }
        let other = self.rule.pick(&plan.rule, &plan.others, call);
        let in_all =
            |index| if plan.canary.is_some_and(|canary| canary <= index) { index + 1 } else { index };
        // The canary is better than nobody.
        other.map(in_all).or(canary)
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let policy = Canary { name: canary()?, rule: P2cEwma::new() };
    let channel = EtcdChannel::builder("hello.rpc").policy(policy).connect().await?;
    let mut greeter = GreeterClient::new(channel);
    for call in 0_u64.. {
        let mut request = Request::new(HelloRequest { name: "World".to_owned() });
        request.set_timeout(Duration::from_secs(2));
        if call % 10 == 9 {
            request.metadata_mut().insert("x-canary", "please".parse()?);
        }
        match greeter.say_hello(request).await {
            Ok(reply) => println!("{}", reply.into_inner().message),
            Err(status) => println!("error: {:?}: {}", status.code(), status.message()),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

fn canary() -> Result<String, lexopt::Error> {
    let mut canary = "127.0.0.1:9091".to_owned();
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("canary") => canary = arguments.value()?.string()?,
            other => return Err(other.unexpected()),
        }
    }
    Ok(canary)
}
