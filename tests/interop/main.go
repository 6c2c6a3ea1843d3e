// The peers that the suite `go_zero` runs against: a go-zero server, a go-zero client and a default grpc-go server.
//
// Each is configured as its users do: by go-zero's YAML, or not at all. Each ends when its stdin does, so it dies with the
// test that started it. What the suite reads are lines on stdout that begin with a word of ours; go-zero logs there too.
package main

import (
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

const usage = "usage: interop server|client|grpc-server [flags]"

func main() {
	if len(os.Args) < 2 {
		fail(usage)
	}
	go endWithStdin()
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	var task func()
	switch os.Args[1] {
	case "server":
		task = serverTask(flags)
	case "client":
		task = clientTask(flags)
	case "grpc-server":
		task = grpcServerTask(flags)
	default:
		fail(usage)
	}
	// ExitOnError: it does not return one.
	_ = flags.Parse(os.Args[2:])
	task()
}

// registry is where and what to register or to look for: go-zero's `Etcd:` block.
type registry struct {
	etcd, key *string
	id        *int64
}

func registryFlags(flags *flag.FlagSet) registry {
	return registry{
		etcd: flags.String("etcd", "", "host:port of etcd"),
		key:  flags.String("key", "", "name of the service"),
		id:   flags.Int64("id", 0, "Etcd.ID; 0 for none"),
	}
}

func (r registry) yaml() string {
	block := fmt.Sprintf("Etcd:\n  Hosts: [%s]\n  Key: %s\n", *r.etcd, *r.key)
	if *r.id > 0 {
		block += fmt.Sprintf("  ID: %d\n", *r.id)
	}
	return block
}

// announce prints where a server listens, once it does: go-zero registers first.
func announce(address string) {
	for {
		connection, err := net.Dial("tcp", address)
		if err == nil {
			connection.Close()
			fmt.Println("listening", address)
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func endWithStdin() {
	io.Copy(io.Discard, os.Stdin)
	os.Exit(1)
}

func fail(why ...any) {
	fmt.Fprintln(os.Stderr, why...)
	os.Exit(2)
}
