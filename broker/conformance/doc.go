// Package conformance holds the tests that check the broker against the MQTT
// standards, statement by statement: docs/conformance.md says which test covers
// which. They know nothing but the broker's public API and the bytes on its
// sockets. There is no code here but tests.
package conformance
