//! Compiles the greeter of the examples and the echo service of the suites

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure()
        .bytes(".test")
        .compile_protos(&["../proto/hello.proto", "proto/echo.proto"], &["../proto", "proto"])
}
