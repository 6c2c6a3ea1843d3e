//! Generates the greeting service from its `.proto`

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=../proto/hello.proto");
    tonic_prost_build::configure().compile_protos(&["../proto/hello.proto"], &["../proto"])
}
