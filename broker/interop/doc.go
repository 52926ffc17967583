// Package interop has tests only: client libraries that others wrote, each in
// its own language and idiom, against the real program. "make interop" runs
// them; they need the build tag interop, because they want more than Go.
package interop
