//go:build !race

package storage

// raceDetector: the tests run many times slower than the program.
const raceDetector = false
