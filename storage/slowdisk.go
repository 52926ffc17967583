//go:build !slowdisk

package storage

// slowDisk does nothing: the disk is as slow as it is.
func slowDisk() {}
