package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"net"
	"time"

	"google.golang.org/grpc"

	"interop/echo"
)

// quiet is the echo service: see tests/proto/echo.proto.
type quiet struct {
	echo.UnimplementedEchoServer
}

func rest(ms uint32) { time.Sleep(time.Duration(ms) * time.Millisecond) }

func (quiet) Unary(_ context.Context, chunk *echo.Chunk) (*echo.Chunk, error) {
	rest(chunk.GetRestMs())
	return &echo.Chunk{Payload: chunk.GetPayload()}, nil
}

// Download rests between chunks, but not before the first: the quiet is that of a stream that has spoken.
func (quiet) Download(wanted *echo.Wanted, stream grpc.ServerStreamingServer[echo.Chunk]) error {
	for chunk := range wanted.GetChunks() {
		if chunk > 0 {
			rest(wanted.GetRestMs())
		}
		if err := stream.Send(&echo.Chunk{Payload: make([]byte, wanted.GetSize())}); err != nil {
			return err
		}
	}
	return nil
}

func (quiet) Bidi(stream grpc.BidiStreamingServer[echo.Chunk, echo.Chunk]) error {
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		rest(chunk.GetRestMs())
		if err := stream.Send(&echo.Chunk{Payload: chunk.GetPayload()}); err != nil {
			return err
		}
	}
}

// grpcServerTask is a grpc-go server without a single option: it closes connections that ping it more often than that
// allows.
func grpcServerTask(_ *flag.FlagSet) func() {
	return func() {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			fail(err)
		}
		server := grpc.NewServer()
		echo.RegisterEchoServer(server, quiet{})
		go announce(listener.Addr().String())
		if err := server.Serve(listener); err != nil {
			fail(err)
		}
	}
}
