package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
)

// Socket is a listening socket that systemd opened for the service.
type Socket struct {
	Name     string // FileDescriptorName= of the socket unit, or the unit's name
	Listener net.Listener
}

// firstSocket is the number of the first descriptor that is passed
// (SD_LISTEN_FDS_START).
const firstSocket = 3

// Sockets takes the sockets of sd_listen_fds(3) over: they are the caller's to
// close, and LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES are gone from the
// environment, so that no child takes them for its own. A socket that cannot be
// listened on (one for datagrams, or with Accept=yes) is closed and told in the
// error, which comes beside the sockets that can. Without systemd there are none
// and no error. It must be called once, early, from one goroutine.
func Sockets() ([]Socket, error) {
	pid, fds, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		if err := os.Unsetenv(name); err != nil {
			return nil, fmt.Errorf("sockets of systemd: %w", err)
		}
	}
	if fds == "" || pid != strconv.Itoa(os.Getpid()) {
		return nil, nil // they are not for us
	}
	n, err := strconv.Atoi(fds)
	if err != nil || n < 0 || n > 1000 {
		return nil, fmt.Errorf("sockets of systemd: LISTEN_FDS %q is not a number of sockets", fds)
	}
	return sockets(firstSocket, n, names)
}

// sockets takes n descriptors from first on. Their names stand in names, with
// colons between.
func sockets(first, n int, names string) ([]Socket, error) {
	list := strings.Split(names, ":")
	var out []Socket
	var errs []error
	for i := range n {
		name := "unknown" // as sd_listen_fds_with_names(3) says
		if names != "" && i < len(list) {
			name = list[i]
		}
		f := os.NewFile(uintptr(first+i), name)
		if f == nil {
			errs = append(errs, fmt.Errorf("socket %q of systemd: descriptor %d cannot be", name, first+i))
			continue
		}
		ln, err := net.FileListener(f) // a copy, which no child inherits
		if err != nil {
			err = fmt.Errorf("socket %q of systemd cannot be listened on: %w", name, err)
		} else {
			out = append(out, Socket{name, ln})
		}
		errs = append(errs, err, f.Close())
	}
	return out, errors.Join(errs...)
}
