package bevywise

import (
	"net/http"
	"strconv"
)

// listConnectedDevices numbers the connected clients from 1, by the time they
// connected.
func (a *api) listConnectedDevices(*http.Request, params) (body, error) {
	devices := map[string]string{}
	for i, c := range a.deps.Clients.Clients() {
		devices[strconv.Itoa(i+1)] = c.ID
	}
	return success(body{"devices": devices}), nil
}
