package storage

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// spaceEvery is how often the room on the disk is looked at, beside the looks
	// after each commit: for what others write.
	spaceEvery = 2 * time.Second
	// reserveShare is the largest part of a file system that is kept free on it,
	// as its inverse: on a small one storage.reserve would be most of it.
	reserveShare = 8
	// logShare is the part of the reserve, as its inverse, that must be free on
	// the file system itself: the log of a transaction cannot use the free pages
	// of the database.
	logShare = 4
)

// Space watches how much room the data directory's file system has left. Below
// the reserve nothing new is to be stored, so that acknowledgements and
// deletions, which have to be written before anything becomes free, always can
// be. Its methods are safe for concurrent use; the zero Space never is low.
type Space struct {
	path    string // of the database
	reserve int64  // bytes, as configured; 0: the disk is not watched
	log     *slog.Logger
	statfs  func(dir string) (size, free int64, err error) // bytes
	inside  func() (free, growth int64, err error)         // see DB.freeInside

	looking sync.Mutex // one look at a time
	failed  bool       // the last look did; guarded by looking

	low    atomic.Bool
	free   atomic.Int64
	wanted atomic.Int64
	room   atomic.Int64 // what is compared with it: with what is free inside the database, without what its log will take
}

// SpaceStats is what the last look found.
type SpaceStats struct {
	Free    int64 // room that the file system has for us, bytes; 0 before the first look
	Reserve int64 // what is kept free of it, bytes; 0: the disk is not watched
	Low     bool  // there is less: nothing new is to be stored
}

// newSpace returns the watch over the disk of db. It looks when it is told to.
func newSpace(db *DB) *Space {
	return &Space{path: db.path, reserve: int64(db.cfg.Reserve), log: db.log, statfs: statfs, inside: db.freeInside}
}

// Space returns the watch over the room on the disk. Its answers count from
// NewJournal on.
func (db *DB) Space() *Space { return db.space }

// Low reports whether there is so little room that nothing new is to be stored.
// It does not look, and costs nothing. The flag rises when there is less than
// the reserve and falls when there is a quarter more than it, so that it does
// not flutter.
func (s *Space) Low() bool { return s.low.Load() }

// Stats returns what the last look found.
func (s *Space) Stats() SpaceStats {
	return SpaceStats{Free: s.free.Load(), Reserve: s.wanted.Load(), Low: s.low.Load()}
}

// Watch looks at the disk every few seconds until ctx ends.
func (s *Space) Watch(ctx context.Context) {
	if s.reserve == 0 {
		return
	}
	tick := time.NewTicker(spaceEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.look()
		}
	}
}

// look looks at the disk, unless somebody is at it. It costs a system call, and
// a query while room is scarce.
func (s *Space) look() {
	if s.reserve == 0 || !s.looking.TryLock() {
		return
	}
	defer s.looking.Unlock()
	low, err := s.measure()
	if err != nil {
		if !s.failed {
			s.log.Warn("room on the disk could not be read", "err", err)
		}
		s.failed = true
		return // what was known before still counts
	}
	s.failed = false
	if low == s.low.Swap(low) {
		return
	}
	if low {
		s.log.Warn("disk is nearly full, what would have to be stored is refused", "room", s.room.Load(), "free", s.free.Load(), "reserve", s.wanted.Load())
	} else {
		s.log.Info("disk has room again", "room", s.room.Load(), "free", s.free.Load(), "reserve", s.wanted.Load())
	}
}

// measure returns whether there is too little room. s.looking is held.
func (s *Space) measure() (low bool, err error) {
	size, free, err := s.statfs(s.path)
	if err != nil {
		return false, fmt.Errorf("statfs: %w", err)
	}
	reserve := min(s.reserve, size/reserveShare)
	s.free.Store(free)
	s.wanted.Store(reserve)
	s.room.Store(free)
	if free >= 4*reserve {
		return false, nil
	}
	// Pages that are free inside the database take new messages too: a database
	// that has been drained keeps its size, and would be refused for ever. What
	// is only in its log is still to be copied to its end.
	unused, growth, err := s.inside()
	if err != nil {
		return false, err
	}
	wanted := reserve
	if s.low.Load() {
		wanted += reserve / 4
	}
	s.room.Store(free + unused - growth)
	return free+unused-growth < wanted || free < wanted/logShare, nil
}

// statfs returns the size of the file system that path is on, and what of it
// this process may still fill, without what is reserved for root; in bytes.
func statfs(path string) (size, free int64, err error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		return 0, 0, err
	}
	block := int64(st.Frsize)
	if block == 0 {
		block = int64(st.Bsize)
	}
	return int64(st.Blocks) * block, int64(st.Bavail) * block, nil
}

// freeInside returns how many bytes of the database's pages are free, and by how
// many its file will grow when what is in the log is copied to it.
func (db *DB) freeInside() (free, growth int64, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), spaceEvery)
	defer cancel()
	var pages, unused, size int64
	err = db.read.QueryRowContext(ctx, `SELECT (SELECT page_count FROM pragma_page_count), (SELECT freelist_count FROM pragma_freelist_count), (SELECT page_size FROM pragma_page_size)`).
		Scan(&pages, &unused, &size)
	if err != nil {
		return 0, 0, wrap(err, "count free pages")
	}
	info, err := os.Stat(db.path)
	if err != nil {
		return 0, 0, fmt.Errorf("look at database: %w", err)
	}
	return unused * size, max(0, pages*size-info.Size()), nil
}
