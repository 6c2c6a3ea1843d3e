//! `src/proto/` is what the generator makes of `proto/`

use std::{env, fs, path::Path};

/// Set it to write the files instead of comparing them.
const WRITE: &str = "ETCD_EMBEDDED_GENERATE";

#[test]
fn the_stubs_in_the_repository_are_those_of_the_protos() {
    if !protoc_is_there() {
        println!("no protoc: nothing was compared");
        return;
    }
    let home = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fresh = env::temp_dir().join(format!("etcd-embedded-proto-{}", std::process::id()));
    fs::create_dir_all(&fresh).unwrap();
    tonic_prost_build::configure()
        .build_client(false)
        .bytes(".")
        .out_dir(&fresh)
        .compile_protos(&[home.join("proto/rpc.proto")], &[home.join("proto")])
        .unwrap();
    for package in ["authpb", "etcdserverpb", "mvccpb"] {
        let kept = home.join(format!("src/proto/{package}.rs"));
        let made = fs::read_to_string(fresh.join(format!("{package}.rs"))).unwrap();
        if env::var_os(WRITE).is_some() {
            fs::write(&kept, made).unwrap();
        } else {
            let kept = fs::read_to_string(kept).unwrap();
            assert!(kept == made, "{package}.rs is old: run this test with {WRITE}=1");
        }
    }
    fs::remove_dir_all(&fresh).unwrap();
}

/// `PROTOC` as the generator takes it, else one on PATH
fn protoc_is_there() -> bool {
    let on_path = || env::split_paths(&env::var_os("PATH")?).find(|dir| dir.join("protoc").is_file());
    env::var_os("PROTOC").is_some() || on_path().is_some()
}
