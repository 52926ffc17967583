//go:build faults

package broker

import "testing"

// TestModelFindsFaults puts each defect in and expects the model checker to
// find it: a checker that finds nothing proves nothing.
func TestModelFindsFaults(t *testing.T) {
	defer activeFault.Store(-1)
	for d, name := range map[defect]string{
		faultAckEarly:       "acknowledgement before commit",
		faultPubcompEarly:   "PUBCOMP before release",
		faultSeqReuse:       "sequence reuse after a restart",
		faultPacketIDReuse:  "packet identifier collision with a stuck entry",
		faultSubackEarly:    "subscription lost after SUBACK",
		faultPubrelEarly:    "PUBREL before its state is durable",
		faultDeliverEarly:   "QoS 2 delivery before it is durable",
		faultSplitInbound:   "QoS 2 identifier apart from its message",
		faultOrphanEarly:    "message of a share group given up before another member has it",
		faultOvertake:       "what is in memory overtakes what is on the disk",
		faultCompactSpilled: "segment written anew without what is on the disk only",
		faultCompactEarly:   "segment written anew without what goes to another member",
		faultDropOvertakes:  "segment deleted ahead of what another member has of it",
		faultLoadBlind:      "part of a queue read in the midst of changes",
	} {
		t.Run(name, func(t *testing.T) {
			activeFault.Store(int32(d))
			for seed := range uint64(modelRuns(100000)) {
				if failure, _ := runModel(seed, nil); failure != "" {
					t.Logf("found with seed %d: %s", seed, failure)
					return
				}
			}
			t.Error("not found")
		})
	}
}
