package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"time"

	"github.com/zeromicro/go-zero/core/conf"
	"github.com/zeromicro/go-zero/zrpc"
	"google.golang.org/grpc"

	"interop/hello"
)

// greeter says who it is at the end of its greeting, as the greeter of the suites does.
type greeter struct {
	hello.UnimplementedGreeterServer
	name string
}

func (g greeter) SayHello(_ context.Context, request *hello.HelloRequest) (*hello.HelloReply, error) {
	// Long enough that of a hundred calls a second one is always in flight.
	time.Sleep(20 * time.Millisecond)
	return &hello.HelloReply{Message: fmt.Sprintf("Hello %s, this is %s", request.GetName(), g.name)}, nil
}

// serverTask is a zrpc server, registered, with the defaults of go-zero's YAML.
func serverTask(flags *flag.FlagSet) func() {
	registry := registryFlags(flags)
	listen := flags.String("listen", "", "host:port; a free port of 127.0.0.1 by default")
	return func() {
		if *listen == "" {
			*listen = freeAddress()
		}
		var config zrpc.RpcServerConf
		yaml := fmt.Sprintf("Name: %s\nListenOn: %s\nLog: {Level: error, Stat: false}\n", *registry.key, *listen)
		if err := conf.LoadFromYamlBytes([]byte(yaml+registry.yaml()), &config); err != nil {
			fail(err)
		}
		server := zrpc.MustNewServer(config, func(server *grpc.Server) {
			hello.RegisterGreeterServer(server, greeter{name: *listen})
		})
		go announce(*listen)
		server.Start()
	}
}

// freeAddress is one that go-zero can be told: `ListenOn: 127.0.0.1:0` publishes port 0.
func freeAddress() string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fail(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}
