package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A disk that gives nothing of the database for a while is not taken for a damaged
// database, though SQLite calls it malformed: deliveries wait, and the rest goes
// on. When the disk is back all is delivered, in order.
func TestDiskUnreadable(t *testing.T) {
	dir := t.TempDir()
	b := startDisk(t, "", dir, "")
	b.sleeper()
	p := b.publisher(4, 1000, 1000, 0)
	b.await("acknowledgements", func() bool { return p.acked.Load() >= 10000 })
	close(p.stop)
	b.await("last acknowledgement", func() bool { return p.acked.Load() == p.sent.Load() })
	total := p.acked.Load()
	if err := b.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	<-b.done

	b = startDisk(t, "", dir, "") // which has nothing of it in memory
	mend := b.spoil("pread64:error=EIO")
	c := b.dial(b.mqtt, "sleeper", 4, false, 0)
	b.await("trouble", func() bool {
		h := b.health()
		return h.Status == 503 && len(h.Reasons) > 0 && strings.HasPrefix(h.Reasons[0], "storage: queues cannot be read")
	})
	fast := b.dial(b.mqtt, "live", 4, true, 0)
	b.subscribe(fast, 1, "live")
	fast.put(mqttPublish<<4|2, mqttString("live"), []byte{0, 1}, []byte("x"))
	if err := fast.w.Flush(); err != nil {
		t.Fatal(err)
	}
	_ = fast.conn.SetReadDeadline(time.Now().Add(killPatience)) // a failure shows at the read
	if first, _, err := fast.read(); err != nil || first>>4 != mqttPublish && first>>4 != mqttPuback {
		t.Fatalf("meanwhile: got packet %x, %v", first, err)
	}
	mend()
	b.await("end of the trouble", func() bool { return b.health().Status == 200 })
	c.conn.Close()
	b.inOrder("after it", b.drain(b.mqtt, total), total)
	if log := readIf(b.out); strings.Contains(log, "salvage") {
		t.Error("the log speaks of salvage")
	}
	if names, err := filepath.Glob(filepath.Join(dir, "penstock.*corrupt*")); err != nil || len(names) > 0 {
		t.Errorf("set aside: %v, %v", names, err)
	}
}
