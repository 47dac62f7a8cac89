// Starts measuring when it is launched, and says on the screen how far it is.

import Combine
import SwiftUI
import UIKit

@main
struct HarnessApp: App {
    @StateObject private var status = Status()
    @Environment(\.scenePhase) private var phase

    var body: some Scene {
        WindowGroup {
            VStack(spacing: 16) {
                Text(status.state).font(.title)
                Text(status.about).font(.footnote)
                ProgressView(value: status.fraction)
                Text("Leave this app in front and the phone alone, out of its case.").font(.footnote)
            }
            .padding()
            .onAppear { status.start() }
        }
        .onChange(of: phase) { _, now in
            status.inFront = now == .active
            if now != .active { status.interrupted = true } else { status.start() }  // after a failure: again
        }
    }
}

/// What the measuring thread and the screen tell each other.
final class Status: ObservableObject {
    @Published private(set) var state = "starting"
    @Published private(set) var about = ""
    @Published private(set) var fraction = 0.0
    private(set) var environment: [String: Any] = [:]
    private let lock = NSLock()
    private var isInFront = true
    private var wasInterrupted = false
    private var started = false
    private var beat = 0  // these three belong to the measuring thread
    private var lastState = ""
    private var lastWritten = Date.distantPast

    var inFront: Bool {
        get { lock.withLock { isInFront } }
        set { lock.withLock { isInFront = newValue } }
    }

    /// Whether the app left the front since this was last set to false.
    var interrupted: Bool {
        get { lock.withLock { wasInterrupted } }
        set { lock.withLock { wasInterrupted = newValue } }
    }

    @MainActor
    func start() {
        if started { return }
        started = true
        UIApplication.shared.isIdleTimerDisabled = true
        environment = describePhone()
        let thread = Thread {
            let documents = FileManager.default.urls(for: .documentDirectory, in: .userDomainMask)[0]
            var place: (sha256: String, out: URL)?
            do {
                clearLeftOvers()
                if let wanted = Job.wanted { place = (wanted, try Job.outFolder(in: documents, of: wanted)) }
                let job = try Job.find(in: documents, wanted: Job.wanted)
                place = (job.sha256, job.out)
                try Bench(job, self).run()
            } catch {
                self.report("failed", "\(error)", done: 0, total: 1, place: place)
                Task { @MainActor in await self.startAgain() }
            }
        }
        thread.qualityOfService = .userInteractive
        thread.stackSize = 8 << 20
        thread.start()
    }

    /// After a failure. Where no computer waits for an answer, a person may be copying the job into the app right now.
    @MainActor
    private func startAgain() async {
        started = false
        if Job.wanted != nil { return }
        try? await Task.sleep(nanoseconds: 10_000_000_000)
        if inFront { start() }
    }

    /// Shows the state and leaves it in progress.json for the computer to fetch, every two seconds at most while it stays
    /// the same: files that are written while something is timed are work that is timed.
    func report(_ state: String, _ about: String, done: Int, total: Int, place: (sha256: String, out: URL)?) {
        if state == lastState && Date().timeIntervalSince(lastWritten) < 2 { return }
        lastState = state
        lastWritten = Date()
        beat += 1
        DispatchQueue.main.async {
            self.state = state
            self.about = about
            self.fraction = Double(done) / Double(max(1, total))
        }
        guard let place = place else { return }
        let progress: [String: Any] = [
            "schema": 1, "job_sha256": place.sha256, "state": state, "about": about, "done": done, "total": total,
            "beat": beat, "written_at": timestamp(),
        ]
        try? jsonLine(progress).write(to: place.out.appendingPathComponent("progress.json"), options: .atomic)
    }
}

/// Removes the compiled models that a killed run left, and what Core ML keeps of models that were compiled before: each is
/// compiled to a new place, so nothing of it is found again, and it fills the phone.
private func clearLeftOvers() {
    if let caches = FileManager.default.urls(for: .cachesDirectory, in: .userDomainMask).first,
        let app = Bundle.main.bundleIdentifier
    {
        try? FileManager.default.removeItem(at: caches.appendingPathComponent("\(app)/com.apple.e5rt.e5bundlecache"))
    }
    let folder = FileManager.default.temporaryDirectory
    for url in (try? FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)) ?? [] {
        try? FileManager.default.removeItem(at: url)
    }
}

/// The phone as it is when measuring starts.
@MainActor
private func describePhone() -> [String: Any] {
    var system = utsname()
    uname(&system)
    let model = withUnsafeBytes(of: &system.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
    let device = UIDevice.current
    device.isBatteryMonitoringEnabled = true
    let battery: String
    switch device.batteryState {
    case .unplugged: battery = "unplugged"
    case .charging: battery = "charging"
    case .full: battery = "full"
    default: battery = "unknown"
    }
    return [
        "model": model,  // such as iPhone16,1
        "os": "\(device.systemName) \(device.systemVersion)",
        "runtime": "coreml",
        "runtime_version": ProcessInfo.processInfo.operatingSystemVersionString,  // Core ML is part of the system
        "low_power_mode": ProcessInfo.processInfo.isLowPowerModeEnabled,
        "battery_state": battery,
        "battery_level": Double(device.batteryLevel),
        "thermal_state_at_start": thermalState(),
        "measured_at": timestamp(),
    ]
}
