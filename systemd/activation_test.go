package systemd

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// TestMain is also the service that TestSockets starts with descriptors, as
// systemd does: it says what it got.
func TestMain(m *testing.M) {
	if os.Getenv("SERVE_SOCKETS") == "" {
		os.Exit(m.Run())
	}
	os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	if os.Getenv("SERVE_SOCKETS") == "other" {
		os.Setenv("LISTEN_PID", "1")
	}
	sockets, err := Sockets()
	for _, s := range sockets {
		fmt.Println(s.Name, s.Listener.Addr().Network(), s.Listener.Addr())
		if c, err := s.Listener.Accept(); err == nil {
			c.Write([]byte("hello from " + s.Name))
			c.Close()
		}
	}
	fmt.Println("error:", err)
	fmt.Println("left:", os.Getenv("LISTEN_PID")+os.Getenv("LISTEN_FDS")+os.Getenv("LISTEN_FDNAMES"))
}

func TestSockets(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	unix, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	var files []*os.File
	for _, s := range []any{tcp, udp, unix} {
		f, err := s.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	run := func(mode, fds, names string) string {
		t.Helper()
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "SERVE_SOCKETS="+mode, "LISTEN_FDS="+fds, "LISTEN_FDNAMES="+names)
		cmd.ExtraFiles = files
		var greetings []string
		done := make(chan struct{})
		go func() {
			defer close(done)
			if mode != "ours" {
				return
			}
			for _, a := range []net.Addr{tcp.Addr(), unix.Addr()} {
				c, err := net.Dial(a.Network(), a.String())
				if err != nil {
					continue
				}
				buf := make([]byte, 100)
				n, _ := c.Read(buf)
				greetings = append(greetings, string(buf[:n]))
				c.Close()
			}
		}()
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		<-done
		return string(out) + strings.Join(greetings, "\n")
	}
	want := fmt.Sprintf("mqtt tcp %s\nlocal unix %s\n", tcp.Addr(), unix.Addr())
	got := run("ours", "3", "mqtt:datagrams:local")
	if !strings.HasPrefix(got, want) || !strings.Contains(got, `socket "datagrams" of systemd cannot be listened on`) ||
		!strings.HasSuffix(got, "left: \nhello from mqtt\nhello from local") {
		t.Errorf("got\n%s\nwant it to begin with\n%s", got, want)
	}
	if got, want := run("other", "3", "mqtt"), "error: <nil>\nleft: \n"; got != want {
		t.Errorf("sockets of another process: got %q, want %q", got, want)
	}
	if got, want := run("none", "", ""), "error: <nil>\nleft: \n"; got != want {
		t.Errorf("none: got %q, want %q", got, want)
	}
	if got := run("odd", "many", ""); !strings.Contains(got, `"many"`) {
		t.Errorf("an odd number: %q", got)
	}
}

func TestSocketsWithoutNames(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	fd := int(f.Fd())
	got, err := sockets(fd, 1, "")
	f.Close() // closed already; so that its finalizer closes no other
	if err != nil || len(got) != 1 || got[0].Name != "unknown" {
		t.Fatalf("got %v, %v", got, err)
	}
	got[0].Listener.Close()
}
