# Penstock. "make" alone lists the targets. The program needs Go, git and make;
# some targets need more, and say so.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

# No cgo: one static binary for any Linux. The race detector alone wants it.
export CGO_ENABLED := 0

LDFLAGS  = -s -w -buildid= -X main.version=$(VERSION)
BINARIES = $(addprefix dist/penstock-linux-,amd64 arm64 armv7 armv6)

# Whether a C compiler works, which the race detector needs.
RACE = $(shell printf '\043include <stdlib.h>\nint main(void) { return 0; }\n' | $${CC:-gcc} -x c - -o /dev/null 2>/dev/null && echo yes)

# Emulators for the tests on ARM: as GOARCH:GOARM:program.
ARM = arm64::qemu-aarch64-static arm:7:qemu-arm-static_-cpu_cortex-a7 arm:6:qemu-arm-static_-cpu_arm1176

.PHONY: help run build test interop lint dist dist-check bench soak test-arm fuzz attack clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

run: build ## start a broker for a trial: MQTT on 127.0.0.1:1883, API on 127.0.0.1:8080, data in ./data; ARGS='--mqtt 127.0.0.1:0 --http 127.0.0.1:0' for free ports
	@exec bin/penstock serve --dev $(ARGS)

build: ## build bin/penstock for this machine
	$(GO) build -trimpath -ldflags '-X main.version=$(VERSION)' -o bin/penstock .

test: ## run all tests, with the race detector if there is a C compiler (wants mosquitto-clients, sqlite3, systemd and strace)
	$(GO) test -tags faults -run '^TestModel$$|FindsFaults' ./broker
	$(GO) test -run '^TestSalvage$$|SalvageOnDiskThatFails|BesideDamage' ./storage
	@if [ '$(RACE)' = yes ]; then \
		set -x; PENSTOCK_MODEL_RUNS=5000 CGO_ENABLED=1 $(GO) test -race -timeout 20m ./...; \
	else \
		echo 'No C compiler works here: testing WITHOUT the race detector (apt-get install gcc libc6-dev).'; \
		set -x; $(GO) test -timeout 20m ./...; \
	fi

# Most of their time the clients wait, so many run at a time.
MQTTJS = broker/interop/testdata/mqttjs
interop: $(MQTTJS)/node_modules/.package-lock.json ## other people's clients against the program (wants mosquitto-clients libpaho-mqtt-dev python3-paho-mqtt nodejs npm gcc)
	$(GO) test -tags interop -count 1 -parallel 10 -timeout 10m ./broker/interop

$(MQTTJS)/node_modules/.package-lock.json: $(MQTTJS)/package-lock.json
	cd $(MQTTJS) && npm ci --no-audit --no-fund
	@touch $@

lint: ## gofmt, go vet (64 and 32 bits) and staticcheck
	@unformatted=$$($$($(GO) env GOROOT)/bin/gofmt -l .); \
		if [ -n "$$unformatted" ]; then echo "gofmt would change: $$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(GO) vet -tags faults ./broker/...
	$(GO) vet -tags slowdisk ./storage
	$(GO) vet -tags interop ./broker/interop
	$(GO) vet -tags attack ./broker/attack
	GOARCH=arm $(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) tool staticcheck -tags slowdisk ./storage
	$(GO) tool staticcheck -tags interop ./broker/interop
	$(GO) tool staticcheck -tags attack ./broker/attack

dist: $(BINARIES) ## build dist/ for all machines: static, stripped, the same bytes for the same commit
	cd dist && sha256sum $(notdir $(BINARIES)) >SHA256SUMS
	@cat dist/SHA256SUMS

dist/penstock-linux-amd64: export GOARCH = amd64
dist/penstock-linux-arm64: export GOARCH = arm64
dist/penstock-linux-armv7: export GOARCH = arm
dist/penstock-linux-armv7: export GOARM = 7
dist/penstock-linux-armv6: export GOARCH = arm
dist/penstock-linux-armv6: export GOARM = 6
# Always built: Go knows better than make what has changed.
$(BINARIES): FORCE
	GOOS=linux $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o $@ .
FORCE:

dist-check: dist ## build dist/ once more, elsewhere and without the cache, and compare
	@set -e; there=$$(mktemp -d); trap 'rm -rf "$$there"' EXIT; \
	mkdir "$$there/a-longer-path"; \
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp -P --parents -t "$$there/a-longer-path"; \
	GOCACHE="$$there/cache" $(MAKE) --no-print-directory -C "$$there/a-longer-path" VERSION='$(VERSION)' dist >/dev/null; \
	diff dist/SHA256SUMS "$$there/a-longer-path/dist/SHA256SUMS"; \
	echo 'dist: two builds are identical'

# A part, shown and not written: make bench BENCH="-quick -scenario 'pairs|idle'"
BENCH ?= -slow bin/penstock-slow -out docs/benchmarks.md $(if $(shell command -v perf),-profile bin/profile)
bench: build ## write docs/benchmarks.md: compare with Debian's mosquitto (an hour; wants mosquitto and, for the profiles, perf)
	$(GO) build -trimpath -tags slowdisk -o bin/penstock-slow .
	$(GO) run ./bench $(BENCH)

MODEL_RUNS  ?= 5000000
KILL_ROUNDS ?= 500
SOAK_FUZZTIME ?= 2m
SOAK_FUZZTIME_MAIN ?= 30m
soak: ## the tests that take hours: MODEL_RUNS (5000000) of the model checker, KILL_ROUNDS (500) of kill -9, power cuts, 500 damaged databases, fuzzing
	PENSTOCK_SOAK=1 PENSTOCK_MODEL_RUNS=$(MODEL_RUNS) PENSTOCK_KILL_ROUNDS=$(KILL_ROUNDS) \
		$(GO) test -count 1 -timeout 24h -v -run 'Soak|Kill|Model|PowerCut|Salvage' ./...
	$(MAKE) --no-print-directory -O -j $(shell nproc) fuzz FUZZFLAGS='-parallel 1' FUZZTIME=$(SOAK_FUZZTIME) FUZZTIME_MAIN=$(SOAK_FUZZTIME_MAIN)

test-arm: ## the tests of broker and storage on emulated ARM: 64 bits, ARMv7, ARMv6 (wants qemu-user-static)
	@set -e; for arm in $(ARM); do \
		arch=$${arm%%:*}; arm=$${arm#*:}; export GOARCH=$$arch GOARM=$${arm%%:*}; \
		emulator=$$(echo "$${arm#*:}" | tr _ ' '); \
		echo "GOARCH=$$GOARCH GOARM=$$GOARM $(GO) test -short -exec '$$emulator' ./broker/... ./storage/..."; \
		PENSTOCK_MODEL_RUNS=2000 $(GO) test -short -timeout 30m -exec "$$emulator" ./broker/... ./storage/...; \
	done

# What strangers reach first: frames, properties, topics, whole connections.
FUZZ_MAIN = FuzzFrame FuzzProperties FuzzSubIndex FuzzWebSocket FuzzConnection

FUZZTIME ?= 10s
FUZZTIME_MAIN ?= $(FUZZTIME)
FUZZFLAGS ?=
# Every fuzz test as its package's folder and its name.
FUZZ := $(shell grep -ro --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' . | sed 's|[^/]*:func ||')
.PHONY: $(FUZZ)
fuzz: $(FUZZ) ## run every fuzz test for FUZZTIME (10s), the most exposed ones for FUZZTIME_MAIN; side by side with -j2 FUZZFLAGS='-parallel 1'
$(FUZZ):
	$(GO) test -run '^$$' -fuzz '^$(@F)$$' -fuzztime $(if $(filter $(@F),$(FUZZ_MAIN)),$(FUZZTIME_MAIN),$(FUZZTIME)) -fuzzminimizetime 10x $(FUZZFLAGS) ./$(@D) </dev/null

attack: ## attack the program and watch a good client meanwhile; ATTACK='-run …' for a part
	$(GO) test -tags attack -count 1 -timeout 15m -v $(ATTACK) ./broker/attack

clean: ## remove what was built (not data/)
	rm -rf bin dist
