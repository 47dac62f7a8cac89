// Visits every model of a job in shuffled rounds, as nas/profilers/timing.py does: a burst of calls of the model between two
// timings of two reference models.

import CoreML
import Foundation

let coolDownSeconds = 30.0
let fullRounds = 20  // visits of each model, within the limits of the plan
let sessionVisits = 4  // of one session of a network that is measured by itself
let fewestDiscardedMs = 6.0  // discarded calls end after so long, and at least two of them

func nanoseconds() -> UInt64 { clock_gettime_nsec_np(CLOCK_UPTIME_RAW) }

func thermalState() -> String {
    switch ProcessInfo.processInfo.thermalState {
    case .nominal: return "nominal"
    case .fair: return "fair"
    case .serious: return "serious"
    case .critical: return "critical"
    @unknown default: return "unknown"
    }
}

func isCool(_ state: String) -> Bool { state == "nominal" || state == "fair" }

/// The same order on every phone, from the job's seed (SplitMix64).
struct Random: RandomNumberGenerator {
    var state: UInt64
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
}

private final class Box<T> { var result: Result<T, Error>? }

/// Does `work` on a thread of its own; nil: it had not ended after `seconds`. The thread is then left to itself, because
/// nothing ends a compilation for the Neural Engine that hangs.
func limited<T>(_ seconds: Double, _ work: @escaping () throws -> T) throws -> T? {
    let box = Box<T>()
    let ended = DispatchSemaphore(value: 0)
    Thread.detachNewThread {
        box.result = Result { try work() }
        ended.signal()
    }
    guard ended.wait(timeout: .now() + seconds) == .success, let result = box.result else { return nil }
    return try result.get()
}

/// The same for work that is asynchronous by itself.
func limitedAsync<T>(_ seconds: Double, _ work: @escaping () async throws -> T) throws -> T? {
    let box = Box<T>()
    let ended = DispatchSemaphore(value: 0)
    Task.detached {
        do { box.result = .success(try await work()) } catch { box.result = .failure(error) }
        ended.signal()
    }
    guard ended.wait(timeout: .now() + seconds) == .success, let result = box.result else { return nil }
    return try result.get()
}

/// One loaded model with a filled input.
final class LoadedModel {
    private let model: MLModel
    private let input: MLFeatureProvider
    let compiled: URL

    init(model: MLModel, compiled: URL, input: Manifest.Input) throws {
        guard input.dtype == "float16" else { throw Trouble("the input is \(input.dtype), not float16") }
        let array = try MLMultiArray(shape: input.shape.map { NSNumber(value: $0) }, dataType: .float16)
        let values = array.dataPointer.bindMemory(to: Float16.self, capacity: array.count)
        var random = Random(state: 0)
        for place in 0..<array.count { values[place] = Float16(Float.random(in: -1.5...1.5, using: &random)) }
        self.input = try MLDictionaryFeatureProvider(dictionary: [input.name: MLFeatureValue(multiArray: array)])
        self.model = model
        self.compiled = compiled
    }

    deinit { try? FileManager.default.removeItem(at: compiled) }

    /// Predicts once; returns the nanoseconds of it.
    func call() throws -> UInt64 {
        try autoreleasepool {
            let start = nanoseconds()
            _ = try model.prediction(from: input)
            return nanoseconds() - start
        }
    }
}

/// Whether a compiled model has operations that the phone puts off the Neural Engine; a model that does nothing has none.
@available(iOS 17.4, *)
func fallsOffNeuralEngine(_ compiled: URL, _ configuration: MLModelConfiguration) async throws -> Bool {
    let plan = try await MLComputePlan.load(contentsOf: compiled, configuration: configuration)
    guard case .program(let program) = plan.modelStructure else { return false }
    var blocks = program.functions.values.map { $0.block }
    while let block = blocks.popLast() {
        for operation in block.operations {
            blocks += operation.blocks
            let kind = operation.operatorName.split(separator: ".").last ?? ""  // "ios16.conv"
            guard kind != "const", kind != "identity", let usage = plan.deviceUsage(for: operation) else { continue }
            if case .neuralEngine = usage.preferred { continue }
            return true
        }
    }
    return false
}

final class Bench {
    private let job: Job
    private let log: Log
    private let status: Status
    private let configuration = MLModelConfiguration()
    private let other: [Float]  // memory that is touched between calls
    private var random: Random
    private var references: [LoadedModel] = []
    private var warm: Set<String> = []
    private var before: [Double]?
    private(set) var sink: Float = 0  // keeps the touching of memory from being optimised away

    private var rounds: Int { max(job.manifest.plan.min_visits, min(fullRounds, job.manifest.plan.passes.last ?? fullRounds)) }

    init(_ job: Job, _ status: Status) throws {
        self.job = job
        self.status = status
        log = try Log(job.out.appendingPathComponent("visits.jsonl"))
        if Job.isAnew { try log.add(["anew": true]) }
        random = Random(state: job.manifest.timing.seed)
        let onCpu = job.manifest.settings.compute_units == "CPU_ONLY"
        // What the Neural Engine keeps of weights between two calls is not ours to clear.
        let most = job.manifest.plan.touched_bytes.values.max() ?? 0
        other = onCpu ? [Float](repeating: 1, count: most / 4) : []
        configuration.computeUnits = onCpu ? .cpuOnly : .cpuAndNeuralEngine
    }

    /// Measures what is not measured yet, twice through with half of the visits each time, and writes results.json. A network that
    /// is measured by itself is opened anew every `sessionVisits`: its interval is of what sessions differ by, too.
    func run() throws {
        let plan = job.manifest.plan
        references = try job.manifest.references.map { name in
            guard let model = try load(name) else { throw Trouble("the reference \(name) does not load: nothing can be paired with it") }
            return model
        }
        let parts = plan.pieces.isEmpty ? rounds / sessionVisits : 2
        for part in 1...parts {
            let visits = rounds * part / parts
            try measure(plan.pieces, until: visits)
            try measure(plan.networks, until: visits)
        }
        try writeResults()
    }

    private func measure(_ names: [String], until visits: Int) throws {
        let plan = job.manifest.plan
        var queue = names.filter { isMeasurable($0) && count($0) < visits }
        while !queue.isEmpty {
            var live: [String: LoadedModel] = [:]
            var size = 0
            while !queue.isEmpty, live.count < plan.batch_models, size < plan.batch_bytes {
                let name = queue.removeFirst()
                report("loading", name)
                if let model = try load(name) {
                    live[name] = model
                    size += bytes(of: name)
                }
            }
            before = nil
            warm = []
            while true {
                let open = live.keys.filter { count($0) < visits }.sorted().shuffled(using: &random)
                if open.isEmpty { break }
                for name in open {
                    guard let model = live[name] else { continue }
                    do {
                        try visit(name, model, touching: plan.touched_bytes[name] ?? 0)
                    } catch {
                        if isDisturbed {  // the model stays open, and comes again
                            warm = []
                            before = nil
                        } else if error is Trouble {
                            throw error  // a reference's, not this model's
                        } else {
                            try log.add(["model": name, "flag": "load-error", "why": "\(error)"])
                            live[name] = nil
                        }
                    }
                    report("measuring", name)
                }
            }
        }
    }

    /// Whether the app left the front: what fails then says nothing about a model.
    private var isDisturbed: Bool { status.interrupted || !status.inFront }

    private func count(_ name: String) -> Int { log.visits[name]?.count ?? 0 }

    /// A model that is off the Neural Engine is timed all the same; one that did not load is not.
    private func isMeasurable(_ name: String) -> Bool { log.flags[name] == nil || log.flags[name] == "off-npu" }

    private func bytes(of name: String) -> Int {
        guard let entry = job.manifest.models[name] else { return 0 }
        let root = job.folder.appendingPathComponent(entry.file)
        let walk = FileManager.default.enumerator(at: root, includingPropertiesForKeys: [.fileSizeKey])
        var total = 0
        while let url = walk?.nextObject() as? URL {
            total += (try? url.resourceValues(forKeys: [.fileSizeKey]).fileSize) ?? 0
        }
        return total
    }

    /// Compiles and loads a model and runs it once, each within the time limit; nil: it did not, and is flagged. What was
    /// disturbed is tried again.
    private func load(_ name: String) throws -> LoadedModel? {
        guard let entry = job.manifest.models[name] else { throw Trouble("the manifest has no model \(name)") }
        if log.deaths(in: name) >= 2 {
            try log.add(["model": name, "flag": "load-error", "why": "the app died twice while it loaded"])
            return nil
        }
        let seconds = job.manifest.timing.load_timeout_s
        let package = job.folder.appendingPathComponent(entry.file)
        guard try packageSHA256(package) == entry.sha256 else {  // tools that copy may leave a file out, and say nothing
            throw Trouble("\(entry.file) did not arrive whole: copy the job again")
        }
        while true {
            waitUntilFit()
            status.interrupted = false
            let flag: [String: Any]
            do {
                try log.add(["model": name, "loading": true])
                defer { try? log.add(["model": name, "loading": false]) }
                if let loaded = try ready(package, entry.input, within: seconds) {
                    try flagOffNeuralEngine(name, loaded, within: seconds)
                    return loaded
                }
                flag = ["model": name, "flag": "timeout"]
            } catch {
                flag = ["model": name, "flag": "load-error", "why": "\(error)"]
            }
            if isDisturbed { continue }
            try log.add(flag)
            return nil
        }
    }

    /// A model that is compiled, loaded and has run once; nil: one of these did not end in time.
    private func ready(_ package: URL, _ input: Manifest.Input, within seconds: Double) throws -> LoadedModel? {
        guard let compiled = try limited(seconds, { try MLModel.compileModel(at: package) }),
            let model = try limited(seconds, { try MLModel(contentsOf: compiled, configuration: self.configuration) })
        else { return nil }
        let loaded = try LoadedModel(model: model, compiled: compiled, input: input)
        // Some models load, and hang or die when they run.
        return try limited(seconds, { try loaded.call() }) == nil ? nil : loaded
    }

    private func flagOffNeuralEngine(_ name: String, _ loaded: LoadedModel, within seconds: Double) throws {
        guard #available(iOS 17.4, *), configuration.computeUnits == .cpuAndNeuralEngine, log.flags[name] == nil else { return }
        // A plan that cannot be read says nothing about the model.
        let falls = try? limitedAsync(seconds) { try await fallsOffNeuralEngine(loaded.compiled, self.configuration) }
        if falls == true { try log.add(["model": name, "flag": "off-npu"]) }
    }

    /// Visits a model until a visit counts: the app in front and the phone not hot, before and after.
    private func visit(_ name: String, _ model: LoadedModel, touching: Int) throws {
        while true {
            waitUntilFit()
            status.interrupted = false
            let stateBefore = thermalState()
            try ofReferences { for (place, model) in references.enumerated() { _ = try warmUp("reference \(place)", model) } }
            if try warmUp(name, model) || before == nil { before = try timeReferences() }
            guard let first = before else { continue }
            let raw = try burst(model, touching: touching)
            let after = try timeReferences()
            before = after
            let states = [stateBefore, thermalState()]
            if states.allSatisfy(isCool) && !status.interrupted {
                let visit = [raw, (first[0] + after[0]) / 2, (first[1] + after[1]) / 2]
                try log.add(["model": name, "visit": visit, "thermal": states])
                return
            }
            try log.add(["dropped": name, "thermal": states])
            pause("cooling")
        }
    }

    private func waitUntilFit() {
        while !isCool(thermalState()) || !status.inFront { pause(status.inFront ? "cooling" : "waiting to be in front") }
    }

    /// Rests; clocks fall meanwhile, so everything is warmed up anew afterwards.
    private func pause(_ state: String) {
        report(state, thermalState())
        Thread.sleep(forTimeInterval: coolDownSeconds)
        warm = []
        before = nil
    }

    /// Runs a model for a while if it has not been since the last pause; returns whether that was so.
    private func warmUp(_ name: String, _ model: LoadedModel) throws -> Bool {
        if !warm.insert(name).inserted { return false }
        let timing = job.manifest.timing
        let start = nanoseconds()
        for _ in 0..<timing.warm_up_calls { _ = try model.call() }
        while Double(nanoseconds() - start) < timing.warm_up_ms * 1e6 { _ = try model.call() }
        return true
    }

    private func timeReferences() throws -> [Double] { try ofReferences { try references.map { try burst($0, touching: 0) } } }

    /// Does `work` with the references, whose failure is not that of the model that is visited.
    private func ofReferences<T>(_ work: () throws -> T) throws -> T {
        do { return try work() } catch { throw Trouble("a reference failed: \(error)") }
    }

    /// The median milliseconds of a few calls in a row, the first ones discarded; before each, so many bytes of other memory are
    /// touched.
    private func burst(_ model: LoadedModel, touching: Int) throws -> Double {
        let timing = job.manifest.timing
        let start = nanoseconds()
        for call in 0..<timing.discarded {
            if call >= 2 && Double(nanoseconds() - start) >= fewestDiscardedMs * 1e6 { break }
            _ = try model.call()
        }
        var times: [UInt64] = []
        var total: UInt64 = 0
        while times.count < timing.min_calls || (Double(total) < timing.visit_ms * 1e6 && times.count < timing.max_calls) {
            if touching > 0 { touchOtherMemory(touching) }
            times.append(try model.call())
            total += times[times.count - 1]
        }
        times.sort()
        let middle = times.count / 2
        let median = times.count % 2 == 1 ? Double(times[middle]) : Double(times[middle - 1] + times[middle]) / 2
        return median / 1e6
    }

    private func touchOtherMemory(_ bytes: Int) {
        other.withUnsafeBufferPointer { values in
            var sum: Float = 0
            for place in stride(from: 0, to: min(bytes / 4, values.count), by: 16) { sum += values[place] }  // a cache line each
            sink = sum
        }
    }

    private func report(_ state: String, _ about: String) {
        let names = job.manifest.plan.pieces + job.manifest.plan.networks
        let done = names.reduce(0) { $0 + (isMeasurable($1) ? min(count($1), rounds) : rounds) }
        status.report(state, about, done: done, total: names.count * rounds, place: (job.sha256, job.out))
    }

    private func writeResults() throws {
        var environment = status.environment
        environment["thermal_states"] = log.thermalStates
        environment["dropped_visits"] = log.dropped
        environment["compute_units"] = job.manifest.settings.compute_units
        let results: [String: Any] = [
            "schema": 4,
            "unit": "ms",
            "job_sha256": job.sha256,
            "device": job.manifest.device,
            "environment": environment,
            "started_at": log.startedAt,
            "finished_at": timestamp(),
            "visits": log.visits,
            "flags": log.flags,
        ]
        let data = try JSONSerialization.data(withJSONObject: results, options: [.sortedKeys])
        try data.write(to: job.out.appendingPathComponent("results.json"), options: .atomic)
        report("done", "")
    }
}
