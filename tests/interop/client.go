package main

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/zeromicro/go-zero/core/conf"
	"github.com/zeromicro/go-zero/zrpc"

	"interop/hello"
)

// clientTask makes calls by key, whatever becomes of the earlier ones, and prints a line for each: `answer WHO` or
// `error WHY`.
func clientTask(flags *flag.FlagSet) func() {
	registry := registryFlags(flags)
	calls := flags.Int("calls", 1, "how many")
	gap := flags.Duration("gap", 10*time.Millisecond, "from the start of one to the start of the next")
	return func() {
		var config zrpc.RpcClientConf
		if err := conf.LoadFromYamlBytes([]byte(registry.yaml()), &config); err != nil {
			fail(err)
		}
		client := hello.NewGreeterClient(zrpc.MustNewClient(config).Conn())
		var running sync.WaitGroup
		ticker := time.NewTicker(*gap)
		defer ticker.Stop()
		for range *calls {
			running.Add(1)
			go func() {
				defer running.Done()
				fmt.Println(greet(client))
			}()
			<-ticker.C
		}
		running.Wait()
	}
}

func greet(client hello.GreeterClient) string {
	// Under go-zero's own deadline, 2 s.
	reply, err := client.SayHello(context.Background(), &hello.HelloRequest{Name: "load"})
	if err != nil {
		return "error " + strings.ReplaceAll(err.Error(), "\n", " ")
	}
	message := reply.GetMessage()
	return "answer " + message[strings.LastIndex(message, " ")+1:]
}
