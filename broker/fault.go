//go:build !faults

package broker

// fault reports whether a defect is put in on purpose. Only a build with the
// tag "faults" has any: tests use it to see that they find what they are for.
func fault(defect) bool { return false }
