// What the app is asked to measure, and where on the phone that lies. Property names are the keys of the file.

import CryptoKit
import Foundation

struct Manifest: Decodable {
    let device: String
    let settings: Settings
    let timing: Timing
    let plan: Plan
    let references: [String]  // names: the one whose weights stay in the caches, the one that streams them
    let models: [String: Entry]

    struct Settings: Decodable {
        let compute_units: String  // CPU_AND_NE or CPU_ONLY
    }

    /// What tells whether the rest can be read.
    struct Kind: Decodable {
        let schema: Int
        let format: String
    }

    struct Timing: Decodable {
        let warm_up_ms: Double
        let warm_up_calls: Int
        let discarded: Int
        let min_calls: Int
        let max_calls: Int
        let visit_ms: Double
        let load_timeout_s: Double
        let seed: UInt64
    }

    struct Plan: Decodable {
        let pieces: [String]
        let networks: [String]
        let touched_bytes: [String: Int]  // of other memory before each call of a piece
        let min_visits: Int
        let passes: [Int]
        let batch_models: Int
        let batch_bytes: Int
    }

    struct Entry: Decodable {
        let file: String
        let sha256: String
        let input: Input
    }

    struct Input: Decodable {
        let name: String
        let shape: [Int]
        let dtype: String
    }
}

struct Trouble: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

struct Job {
    let manifest: Manifest
    let sha256: String  // of the manifest's bytes
    let folder: URL
    let out: URL

    /// Finds the job with this SHA-256, or the newest one, anywhere under the app's documents: copying tools differ in
    /// whether they keep the name of the folder that they copy.
    static func find(in documents: URL, wanted: String?) throws -> Job {
        var candidates: [(date: Date, url: URL)] = []
        let keys: [URLResourceKey] = [.contentModificationDateKey]
        let walk = FileManager.default.enumerator(at: documents, includingPropertiesForKeys: keys)
        while let url = walk?.nextObject() as? URL {
            if url.pathExtension == "mlpackage" {
                walk?.skipDescendants()
            } else if url.lastPathComponent == "manifest.json" {
                let date = try url.resourceValues(forKeys: Set(keys)).contentModificationDate
                candidates.append((date ?? .distantPast, url))
            }
        }
        for candidate in candidates.sorted(by: { $0.date > $1.date }) {
            let data = try Data(contentsOf: candidate.url)
            let sha256 = hex(SHA256.hash(data: data))
            if wanted != nil && wanted != sha256 { continue }
            let kind = try JSONDecoder().decode(Manifest.Kind.self, from: data)
            guard kind.schema == 4, kind.format == "coreml" else {
                throw Trouble("the job is of schema \(kind.schema), format \(kind.format): this app measures schema 4, coreml")
            }
            let manifest = try JSONDecoder().decode(Manifest.self, from: data)
            guard manifest.references.count == 2 else { throw Trouble("the job has no two references") }
            let out = try outFolder(in: documents, of: sha256)
            return Job(manifest: manifest, sha256: sha256, folder: candidate.url.deletingLastPathComponent(), out: out)
        }
        throw Trouble("there is no job on this phone: copy the job folder into the app's documents")
    }

    /// Makes the folder of what is said about a job.
    static func outFolder(in documents: URL, of sha256: String) throws -> URL {
        let out = documents.appendingPathComponent("out-\(sha256.prefix(12))")
        try FileManager.default.createDirectory(at: out, withIntermediateDirectories: true)
        return out
    }

    /// The SHA-256 that the app was launched with.
    static var wanted: String? {
        ProcessInfo.processInfo.arguments.dropFirst().first { $0.count == 64 && $0.allSatisfy(\.isHexDigit) }
    }

    /// Whether a command on the computer has begun with this launch: it may have ended the app before, by installing it.
    static var isAnew: Bool { ProcessInfo.processInfo.arguments.dropFirst().contains("anew") }
}

func hex(_ digest: SHA256.Digest) -> String { digest.map { String(format: "%02x", $0) }.joined() }

/// The SHA-256 over a package's files, as `package_sha256` of nas/coreml_package.py has it.
func packageSHA256(_ package: URL) throws -> String {
    var lines = ""
    for name in (FileManager.default.subpaths(atPath: package.path) ?? []).sorted() where !name.hasSuffix(".DS_Store") {
        let url = package.appendingPathComponent(name)
        guard try url.resourceValues(forKeys: [.isRegularFileKey]).isRegularFile == true else { continue }
        let data = try Data(contentsOf: url)
        lines += "\(name) \(hex(SHA256.hash(data: data)))\n"
    }
    return hex(SHA256.hash(data: Data(lines.utf8)))
}

/// A JSON object as the bytes of one line.
func jsonLine(_ object: [String: Any]) throws -> Data {
    try JSONSerialization.data(withJSONObject: object, options: [.sortedKeys]) + Data("\n".utf8)
}

/// Everything measured so far, appended line by line: a kill loses one visit at most.
final class Log {
    private(set) var visits: [String: [[Double]]] = [:]  // raw, cached reference, streaming reference; ms
    private(set) var flags: [String: String] = [:]
    private(set) var thermalStates: [String: Int] = [:]  // how often each was seen before or after a burst
    private(set) var dropped = 0
    private(set) var startedAt = ""
    private var loads: [String: Int] = [:]  // begun and not ended since a command began: the app died in them
    private let file: FileHandle

    init(_ url: URL) throws {
        if !FileManager.default.fileExists(atPath: url.path) {
            FileManager.default.createFile(atPath: url.path, contents: nil)
        }
        file = try FileHandle(forWritingTo: url)
        let data = try Data(contentsOf: url)
        for line in data.split(separator: UInt8(ascii: "\n")) {
            if let entry = (try? JSONSerialization.jsonObject(with: Data(line))) as? [String: Any] { take(entry) }
        }
        try file.seekToEnd()
        if let last = data.last, last != UInt8(ascii: "\n") { try file.write(contentsOf: Data("\n".utf8)) }
        if startedAt.isEmpty { try add(["started_at": timestamp()]) }
    }

    /// How often the app died while it loaded this model.
    func deaths(in model: String) -> Int { loads[model, default: 0] }

    func add(_ entry: [String: Any]) throws {
        take(entry)
        try file.write(contentsOf: jsonLine(entry))
    }

    private func take(_ entry: [String: Any]) {
        if let started = entry["started_at"] as? String { startedAt = started }
        for state in entry["thermal"] as? [String] ?? [] { thermalStates[state, default: 0] += 1 }
        if entry["dropped"] != nil { dropped += 1 }
        if entry["anew"] != nil { loads = [:] }
        guard let model = entry["model"] as? String else { return }
        if let visit = entry["visit"] as? [Double], visit.count == 3 { visits[model, default: []].append(visit) }
        if let flag = entry["flag"] as? String { flags[model] = flag }
        if let loading = entry["loading"] as? Bool { loads[model, default: 0] += loading ? 1 : -1 }
    }
}

func timestamp() -> String {
    let format = ISO8601DateFormatter()
    format.formatOptions = [.withInternetDateTime, .withFractionalSeconds]
    return format.string(from: Date())
}
