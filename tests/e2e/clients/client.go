// SPDX-License-Identifier: LGPL-2.1-or-later

// A client with go-qemu as it comes: each step prints a line for the test to compare.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
)

func main() {
	monitor, err := qmp.NewSocketMonitor("unix", os.Args[1], 20*time.Second)
	if err != nil {
		log.Fatal(err)
	}
	if err := monitor.Connect(); err != nil {
		log.Fatal(err)
	}
	defer monitor.Disconnect()
	events, err := monitor.Events(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	heard := make(chan qmp.Event, 100)
	go func() {
		for event := range events {
			heard <- event
		}
	}()
	run := func(command string) []byte {
		reply, err := monitor.Run([]byte(command))
		if err != nil {
			fmt.Println("error", err)
		}
		return reply
	}
	var listed struct {
		Return []struct{ Name string }
	}
	if err := json.Unmarshal(run(`{"execute": "query-commands"}`), &listed); err != nil {
		log.Fatal(err)
	}
	for _, command := range listed.Return {
		fmt.Println("command", command.Name)
	}
	if len(run(`{"execute": "query-qmp-schema"}`)) > 0 {
		fmt.Println("schema")
	}
	add := `{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "go", "data": "letmein"}}`
	run(`{"execute": "secret-events", "arguments": {"enable": true}}`)
	run(add)
	run(add)
	fmt.Println("added")
	bufio.NewReader(os.Stdin).ReadString('\n')
	run(`{"execute": "object-del", "arguments": {"id": "go"}}`)
	event := <-heard
	fmt.Println("event", event.Event, event.Data["id"])
}
