//! Targets under random input

use super::target::Target;
use crate::fuzz::{assert_one_line, assert_secret, run, with_password};

const TARGETS: [&str; 10] = [
    "hello.rpc",
    "etcd:///a:2379,b:2379?key=hello.rpc",
    "etcd:///root:secret@a:2379?key=%2Fsvc%2fhello&namespace=/service",
    "etcd:///https://a:2379?key=hello.rpc&tls_ca=/etc/ca.pem&tls_server_name=etcd&require_tls=true",
    "etcd:///[::1]:2379?x=1&key=",
    "direct:///h1:9090, [::1]:9091",
    "direct:///https://h1:1",
    "k8s://ns/svc:80",
    "root:secret@a:2379?key=hello.rpc",
    "",
];

#[test]
fn any_text_is_a_target_or_an_error_of_one_line_without_secrets() {
    run("target", &TARGETS, |input| {
        let text = String::from_utf8_lossy(input);
        if let Err(error) = text.parse::<Target>() {
            // As long as what its author wrote.
            assert_one_line(&error, 4000 + text.len() * 20);
        }
        if let Err(error) = with_password(&text).parse::<Target>() {
            assert_secret(&error);
        }
    });
}
