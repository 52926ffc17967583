package hw

import "fmt"

// A State is one thing that the LEDs can tell. Several may be on at once; they
// are ordered by severity, the worst comes last.
type State int

const (
	Starting     State = iota // always on, below everything else
	Traffic                   // packets are flowing
	UplinkUp                  // a bridge is connected
	Running                   // clients are served
	UplinkDown                // a configured bridge is not connected
	Degraded                  // something is wrong, service goes on
	StorageFault              // acknowledgements wait for a disk that fails
	Stopped                   // Run is over
	numStates
)

var stateNames = [numStates]string{
	Starting:     "starting",
	Traffic:      "traffic",
	UplinkUp:     "uplink up",
	Running:      "running",
	UplinkDown:   "uplink down",
	Degraded:     "degraded",
	StorageFault: "storage fault",
	Stopped:      "stopped",
}

func (s State) String() string {
	if s < 0 || s >= numStates || stateNames[s] == "" {
		return fmt.Sprintf("state(%d)", int(s))
	}
	return stateNames[s]
}

// A Role is what an LED of the gateway is for.
type Role int

// The roles. A gateway with a single LED has Status.
const (
	Status Role = iota
	Uplink
	Fault
	Activity
	numRoles
)

var roleNames = [numRoles]string{
	Status:   "status",
	Uplink:   "uplink",
	Fault:    "fault",
	Activity: "activity",
}

func (r Role) String() string {
	if r < 0 || r >= numRoles || roleNames[r] == "" {
		return fmt.Sprintf("role(%d)", int(r))
	}
	return roleNames[r]
}

// table is what each LED plays in each state. On the status LED every state
// that stops or endangers service has a pattern of its own, because many
// gateways have no other LED. Running is a heartbeat and not a steady light,
// which a process that hangs would leave on as well. The activity LED is dark
// without traffic, so an idle gateway does not wake up for it.
var table = [numStates][numRoles]Pattern{
	Starting:     {Status: On, Uplink: Off, Fault: Off, Activity: Off},
	Traffic:      {Status: Under, Uplink: Under, Fault: Under, Activity: Flicker},
	UplinkUp:     {Status: Under, Uplink: On, Fault: Under, Activity: Under},
	Running:      {Status: Heartbeat, Uplink: Under, Fault: Under, Activity: Under},
	UplinkDown:   {Status: SlowBlink, Uplink: SlowBlink, Fault: Under, Activity: Under},
	Degraded:     {Status: DoubleFlash, Uplink: Under, Fault: SlowBlink, Activity: Under},
	StorageFault: {Status: FastBlink, Uplink: Under, Fault: FastBlink, Activity: Under},
	Stopped:      {Status: Off, Uplink: Off, Fault: Off, Activity: Off},
}

// states is a set of states, one bit each.
type states uint32

func (on states) worst() State {
	for s := numStates - 1; s > Starting; s-- {
		if on&(1<<s) != 0 {
			return s
		}
	}
	return Starting
}

// pattern is what the LED of role r plays while these states are on.
func (on states) pattern(r Role) Pattern {
	for s := numStates - 1; s > Starting; s-- {
		if p := table[s][r]; on&(1<<s) != 0 && p != Under {
			return p
		}
	}
	return table[Starting][r]
}
